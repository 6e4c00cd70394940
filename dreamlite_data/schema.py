"""The Arrow schema of every table in the lake, in one place, and the order in which they are created.
Content tables are keyed by content, operator tables by (subject_id, op_version), tracking tables by run and step."""

from __future__ import annotations

import pyarrow as pa

ID = pa.string()  # hex sha256, or a name
TIME = pa.timestamp("us", tz="UTC")


def _schema(**fields: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind) for name, kind in fields.items()])


CONTENT: dict[str, pa.Schema] = {
    # image_id is the sha256 of `bytes`; the only table that holds image bytes.
    "images": _schema(image_id=ID, bytes=pa.binary(), mime=ID, width=pa.int32(), height=pa.int32(), size_bytes=pa.int64()),
    # One row per place an image came from. `stored` is 'original' or 'normalised'; `role` is '', 'source',
    # 'target', 'left' or 'right'; `origin` is the data set that the row was first published in.
    "provenance": _schema(
        image_id=ID, record_id=ID, role=ID, source=ID, shard=ID, source_key=ID, url=ID, licence=ID, caption_raw=pa.string(),
        stored=ID, original_mime=ID, original_sha256=ID, notes=pa.string(), ingested_in=ID, origin=ID,
    ),
    "captions": _schema(caption_id=ID, image_id=ID, style=ID, text=pa.string(), captioner=ID, op_version=ID),
    "edits": _schema(
        edit_id=ID, source_image_id=ID, target_image_id=ID, instruction=pa.string(), edit_type=ID, route=ID, parent_edit_id=ID,
        op_version=ID, relation=ID, session_id=ID, turn=pa.int32(), rejected=pa.bool_(), reject_reason=pa.string(),
    ),
    # Every wording of a triplet's instruction; form is 'short', 'long' or what a source calls it.
    "instructions": _schema(
        instruction_id=ID, edit_id=ID, form=ID, text=pa.string(), instructor=ID, prompt_id=ID, op_version=ID
    ),
    # Where an edit belongs, as a 1-bit PNG of the target's size; origin is the route or source that knows.
    "edit_masks": _schema(edit_id=ID, mask_png=pa.binary(), mask_fraction=pa.float32(), origin=ID),
    # The cut-outs in a composite's pictures, by the sha256 of their files; and what is known of each cut-out.
    "edit_parts": _schema(edit_id=ID, cutout_ids=pa.list_(pa.string())),
    "cutouts": _schema(cutout_id=ID, name=ID, origin=ID, licence=ID, url=ID),
    # Two results of one instruction, compared by people. Follow and quality keep the provider's own scale.
    "preferences": _schema(
        preference_id=ID, source_image_id=ID, left_image_id=ID, right_image_id=ID, instruction=pa.string(), edit_type=ID,
        left_model=ID, right_model=ID, left_follow=pa.float32(), right_follow=pa.float32(), left_quality=pa.float32(),
        right_quality=pa.float32(), vote=ID, origin=ID, licence=ID, record_id=ID, op_version=ID,
    ),
    # Numbers that came with a record: similarities, judges' scores. subject_id is the edit, preference or image they are about.
    "provider_scores": _schema(subject_id=ID, record_id=ID, name=ID, value=pa.float64(), op_version=ID),
    # mu and log_sigma are means over heads; the heads of an EditReward stand beside them, null for other scorers and in older rows.
    "scores": _schema(
        subject_id=ID, op_version=ID, task=ID, scorer_id=ID, mu=pa.float32(), log_sigma=pa.float32(), error=pa.string(),
        follow_mu=pa.float32(), follow_log_sigma=pa.float32(), quality_mu=pa.float32(), quality_log_sigma=pa.float32(), n_tokens=pa.int32(),
    ),
}  # fmt: skip

TRIPLET_MEASURES = (
    "edited_fraction", "clear_fraction", "inside_change", "outside_change", "structure_outside", "inside_fraction", "outside_fraction",
    "correlation", "phash_distance", "side_agrees", "count_agrees", "colour_distance", "direction_agrees", "thing_colour_distance",
    "destination_agrees", "background_distance", "motion_correlation", "style_distance",
)  # fmt: skip

OPERATORS: dict[str, pa.Schema] = {
    # One row per tar shard, or per file of a folder: what was read, and why a shard was quarantined.
    "op_shard": _schema(
        subject_id=ID, op_version=ID, source=ID, shard=ID, digest=ID, rows=pa.int64(), failed=pa.int64(), error=pa.string()
    ),
    # One row per URL of a list, fetched or not: subject_id is the URL; error is the reason, `permanent` that it is not asked again.
    "op_download": _schema(
        subject_id=ID, op_version=ID, status=pa.int32(), sha256=ID, size_bytes=pa.int64(), etag=ID, mime=ID, tries=pa.int32(),
        permanent=pa.bool_(), error=pa.string(), detail=pa.string(),
    ),
    # One row per record of a source, good or bad.
    "op_ingest": _schema(
        subject_id=ID, op_version=ID, source=ID, domain=ID, shard=ID, source_key=ID, task=ID, image_id=ID, source_image_id=ID,
        caption_id=ID, edit_id=ID, notes=pa.string(), error=pa.string(), detail=pa.string(), shard_digest=ID,
    ),
    # pixel_hash: XXH3-128 of the decoded pixels; written by ingest from its own decode, by the operator for other images.
    "op_quality": _schema(
        subject_id=ID, op_version=ID, pixel_hash=ID, phash=pa.uint64(), sharpness=pa.float32(), brightness=pa.float32(),
        contrast=pa.float32(), entropy_bits=pa.float32(), colourfulness=pa.float32(), dark_fraction=pa.float32(),
        light_fraction=pa.float32(), clipped_fraction=pa.float32(), error=pa.string(),
    ),
    # kind: 'first' (opens its group), 'pixels' (same pixels, other bytes), 'near' (pHash within the radius), 'linked' (near
    # to a near one). pixel_hash and phash are repeated so that new rows meet the history in one scan; phash is null where
    # the image is too small to be compared by it.
    "op_duplicates": _schema(
        subject_id=ID, op_version=ID, group_id=ID, kind=ID, distance=pa.int32(), pixel_hash=ID, phash=pa.uint64(), error=pa.string()
    ),
    # kind as in op_duplicates; similarity is the cosine to the nearest member that was there before, cluster its centroid.
    "op_semantic": _schema(
        subject_id=ID, op_version=ID, group_id=ID, kind=ID, similarity=pa.float32(), cluster=pa.int32(), error=pa.string()
    ),
    # One row per image, caption and triplet; benchmark is null where it meets none. distance in bits for kind 'near'.
    "op_contamination": _schema(
        subject_id=ID, op_version=ID, benchmark=ID, entry=pa.string(), kind=ID, distance=pa.int32(), error=pa.string()
    ),
    # One row per subject of a route; edit_ids are all triplets it made, rejected tries and inverses too. `retry` as in op_describe.
    "op_edit": _schema(
        subject_id=ID, op_version=ID, edits=pa.int32(), edit_ids=pa.list_(pa.string()), retry=pa.bool_(), error=pa.string()
    ),
    # Only where quotas steer: the types (level1/level2) that each route shall make of an image.
    "op_edit_plan": _schema(
        subject_id=ID, op_version=ID, exact=pa.list_(pa.string()), composite=pa.list_(pa.string()), model=pa.list_(pa.string()), error=pa.string()
    ),
    "op_caption": _schema(
        subject_id=ID, op_version=ID, caption_id=ID, text=pa.string(), scene_json=pa.string(), residual=pa.float32(),
        reason=pa.string(), error=pa.string(),
    ),
    "op_verify_caption": _schema(
        subject_id=ID, op_version=ID, in_language=pa.bool_(), matches=pa.bool_(), reason=pa.string(), error=pa.string()
    ),
    # edit_mask: 8 x 8 cells row by row, one byte each, share of changed pixels in the cell as 0..255.
    "op_verify_edit": _schema(
        subject_id=ID, op_version=ID, in_language=pa.bool_(), matches=pa.bool_(), edited_fraction=pa.float32(),
        outside_fraction=pa.float32(), edit_mask=pa.binary(), reason=pa.string(), error=pa.string(),
    ),
    # Further captions, one operator per captioner and style. `retry`: the call failed for a passing reason and is made again.
    "op_describe": _schema(
        subject_id=ID, op_version=ID, style=ID, captioner=ID, prompt_id=ID, caption_id=ID, text=pa.string(), reason=pa.string(),
        retry=pa.bool_(), error=pa.string(),
    ),
    # `vector` has length 1. `similarity` is the cosine of a caption and its image, `clip_score` a hundred times that.
    "op_embed": _schema(subject_id=ID, op_version=ID, model=ID, vector=pa.list_(pa.float32()), error=pa.string()),
    "op_similarity": _schema(
        subject_id=ID, op_version=ID, model=ID, similarity=pa.float32(), clip_score=pa.float32(), error=pa.string()
    ),
    # What was not asked for is null. `face_fraction`: share of the image's area inside face boxes.
    "op_safety": _schema(
        subject_id=ID, op_version=ID, nsfw=pa.float32(), nsfw_label=ID, faces=pa.int32(), face_fraction=pa.float32(),
        watermark=pa.float32(), error=pa.string(),
    ),
    "op_text": _schema(
        subject_id=ID, op_version=ID, text_fraction=pa.float32(), lines=pa.int32(), words=pa.list_(pa.string()), error=pa.string()
    ),
    # What the rules of a triplet's type read of its pixels, from the decode of op_verify_edit; verify_measures.py says what each is.
    # Null: its rule does not read it, or the words do not call for it; `absent` names those that the rule reads and that could not
    # be taken, as without a mask. `sizes` is set where the pictures differ in size, and then alone.
    "op_triplet_measures": _schema(
        subject_id=ID, op_version=ID, rule=ID, sizes=ID, absent=pa.list_(pa.string()), **dict.fromkeys(TRIPLET_MEASURES, pa.float64()), error=pa.string()
    ),
    # Cosines of a triplet's embeddings: target picture and its words; the change of the pictures and that of the words.
    "op_edit_similarity": _schema(
        subject_id=ID, op_version=ID, model=ID, clip_target=pa.float64(), clip_direction=pa.float64(), error=pa.string()
    ),
    # What a chat model says to "was this edit done?"; `skipped` is why it was not asked. `retry` as in op_describe.
    "op_edit_question": _schema(
        subject_id=ID, op_version=ID, model=ID, prompt_id=ID, yes=pa.bool_(), answer=pa.string(), skipped=pa.string(), retry=pa.bool_(),
        error=pa.string(),
    ),
    # verdict: 'pass', 'fail', or 'not_evaluated' where a required measure was not available; rule is the entry of verify_rules.yaml.
    "op_verify_triplet": _schema(
        subject_id=ID, op_version=ID, inside_change=pa.float32(), outside_change=pa.float32(), edited_fraction=pa.float32(),
        structure_outside=pa.float32(), rule=ID, verdict=ID, failed=pa.list_(pa.string()), not_evaluated=pa.list_(pa.string()),
        error=pa.string(),
    ),
    # The highest position names the current version of each operator, so a setting that is turned back costs nothing.
    "operator_versions": _schema(name=ID, op_version=ID, config_json=pa.string(), position=pa.int64()),
    # What a label of an origin means, and how much of each level1 a mix wants: the packaged taxonomy.yaml as rows.
    "taxonomy": _schema(origin=ID, label=ID, level1=ID, level2=ID, version=pa.int32(), digest=ID),
    "edit_quotas": _schema(mix=ID, category=ID, level1=ID, share=pa.float64(), version=pa.int32(), digest=ID),
}  # fmt: skip

DATASETS: dict[str, pa.Schema] = {
    "datasets": _schema(
        name=ID, version=pa.int32(), digest=ID, policy_digest=ID, snapshot=pa.int64(), parent=pa.int32(), rows=pa.int64()
    ),
    "dataset_rows": _schema(
        name=ID, version=pa.int32(), row_id=ID, task=ID, image_id=ID, source_image_id=ID, text=pa.string(), edit_type=ID,
        edited_fraction=pa.float32(), edit_mask=pa.binary(), weight=pa.float32(), split=ID,
    ),
    "policy_rules": _schema(dataset=ID, version=pa.int32(), position=pa.int32(), rule=ID, body=pa.string(), parameters=pa.string()),
    "decisions": _schema(
        dataset=ID, version=pa.int32(), row_id=ID, image_id=ID, verdict=ID, first_rule=ID, rule_position=pa.int32(),
        margin=pa.float64(), failed=pa.list_(pa.string()),
    ),
}  # fmt: skip

TRACKING: dict[str, pa.Schema] = {
    "runs": _schema(
        run_id=ID, flow=ID, preset=ID, config_json=pa.string(), git_commit=ID, started_at=TIME, ended_at=TIME, state=ID
    ),
    "steps": _schema(
        run_id=ID, step=ID, key=ID, state=ID, started_at=TIME, ended_at=TIME, seconds=pa.float64(), outputs_json=pa.string(),
        metrics_json=pa.string(), key_parts_json=pa.string(),
    ),
    "lineage": _schema(child_kind=ID, child_id=ID, parent_kind=ID, parent_id=ID, role=ID),
    "metrics": _schema(run_id=ID, step=ID, name=ID, position=pa.float64(), value=pa.float64()),
    "checkpoints": _schema(
        checkpoint_id=ID, stage=ID, path=pa.string(), step=pa.int64(), parent_id=ID, dataset=ID, dataset_version=ID, digest=ID
    ),
    "artifacts": _schema(artifact_id=ID, kind=ID, path=pa.string(), bytes=pa.int64(), digest=ID, metrics_json=pa.string()),
    # `low`, `high`: ends of the 95 % interval where `value` is a rate.
    "evals": _schema(run_id=ID, stage=ID, task=ID, metric=ID, value=pa.float64(), n=pa.int64(), low=pa.float64(), high=pa.float64()),
    # One row a picture. The same question_id and repetition is the same question, drawn from the same noise by every stage; `wrong` names
    # the parts that the verifier read otherwise than asked.
    "eval_answers": _schema(
        run_id=ID, stage=ID, task=ID, question_id=ID, repetition=pa.int32(), kind=ID, text=pa.string(), exact=pa.bool_(),
        wrong=pa.list_(pa.string()), reward=pa.float64(),
    ),
}  # fmt: skip

GOVERNANCE: dict[str, pa.Schema] = {
    # Policies that a user committed. The row with the highest position holds for its dataset; one without text gives the dataset
    # back to the packaged policy. `parameters_json` holds what --set gave, over the settings of the refresh.
    "policies": _schema(
        name=ID, position=pa.int64(), digest=ID, text=pa.string(), parameters_json=pa.string(), committed_at=TIME, version=pa.int32()
    ),
    # What was asked to be forgotten and what that took. `proof` is null until the files are gone and the lake has been scanned.
    "takedowns": _schema(
        takedown_id=ID, image_id=ID, reason=pa.string(), requested_at=TIME, rows_removed=pa.int64(), files_rewritten=pa.int64(),
        datasets=pa.list_(pa.string()), checkpoints=pa.list_(pa.string()), expired_snapshots=pa.list_(pa.int64()),
        text_digests=pa.list_(pa.string()), proof=ID,
    ),
    # Every image that must not come back: by the sha256 of its bytes as stored and as they came, and by its pixels.
    "tombstones": _schema(
        image_id=ID, original_sha256=ID, pixel_sha256=ID, width=pa.int32(), height=pa.int32(), takedown_id=ID, reason=pa.string()
    ),
}  # fmt: skip

TABLES: dict[str, pa.Schema] = {**CONTENT, **OPERATORS, **DATASETS, **TRACKING, **GOVERNANCE}

CONTENT_KEYS = {
    "images": "image_id", "captions": "caption_id", "edits": "edit_id", "instructions": "instruction_id", "edit_masks": "edit_id",
    "edit_parts": "edit_id",
}  # fmt: skip
"""Tables in which a row is stored once however often a source brings it."""

MEASURED_AT_INGEST = frozenset({"op_quality"})
"""Operator tables that ingest fills as well, for images that may come again: one row per subject and version."""

RECORD_TABLES = ("provider_scores", "preferences")
"""Tables whose rows belong to one record (record_id) and go when it is withdrawn or read again."""


def conform(table: str, rows: pa.Table) -> pa.Table:
    """`rows` with exactly the columns, order and types of `table`: missing columns become null, unknown ones raise
    ValueError. Raises KeyError where the lake has no such table."""
    schema = TABLES.get(table)
    if schema is None:
        raise KeyError(f"the lake has no table {table!r}; its tables are {', '.join(TABLES)}")
    unknown = [name for name in rows.column_names if name not in schema.names]
    if unknown:
        raise ValueError(f"table {table!r} has no column {', '.join(unknown)}; its columns are {', '.join(schema.names)}")
    columns = [
        rows[field.name].cast(field.type) if field.name in rows.column_names else pa.nulls(len(rows), field.type) for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def rows_table(table: str, rows: list[dict]) -> pa.Table:
    """A list of dicts as a table of `table`'s schema; a key that is no column raises ValueError."""
    schema = TABLES[table]
    unknown = sorted({key for row in rows for key in row} - set(schema.names))
    if unknown:
        raise ValueError(f"table {table!r} has no column {', '.join(unknown)}; its columns are {', '.join(schema.names)}")
    return pa.Table.from_pylist(rows, schema=schema)
