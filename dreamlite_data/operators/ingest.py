"""Bring units of the sources in: every record becomes a clean image with its provenance, or the row of a failure.
Decodes each file once, keeps plain RGB files as they are and stores everything else as a normalised PNG."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dreamlite_data import images, schema, sources
from dreamlite_data.operators import ingest_rows
from dreamlite_data.operators.appearance import Appearance
from dreamlite_data.operators.base import Written, op_version, stamp, write_table
from dreamlite_data.operators.quality import Quality, quality_rows, said
from dreamlite_data.settings import IngestSettings
from dreamlite_data.sources.base import Record, Unit


def caption_id(image_id: str, style: str, text: str) -> str:
    """Id of a caption: the same words about the same image in the same style are one caption."""
    return hashlib.sha256(f"{image_id}\0{style}\0{text}".encode()).hexdigest()


def edit_id(source_image_id: str, target_image_id: str, instruction: str) -> str:
    """Id of a triplet."""
    return hashlib.sha256(f"{source_image_id}\0{target_image_id}\0{instruction}".encode()).hexdigest()


TABLES = ("images", "provenance", "captions", "edits", *ingest_rows.SIDE_TABLES, "op_ingest", "op_shard")
"""What one task writes, a file each."""


class Ingest:
    """Operator over raw files: `payload` in, the bytes to store and what was done to them out. How the images look comes
    from the same decode, as rows of op_quality."""

    name = "ingest"
    version = 1
    reads = ("subject_id", "payload")
    table = "op_ingest"
    resources = {"num_cpus": 1.0}
    schema = pa.schema([
        ("subject_id", pa.string()), ("image_id", pa.string()), ("bytes", pa.binary()), ("mime", pa.string()), ("width", pa.int32()),
        ("height", pa.int32()), ("stored", pa.string()), ("original_mime", pa.string()), ("original_sha256", pa.string()),
        ("notes", pa.string()), ("error", pa.string()), ("detail", pa.string()),
    ])  # fmt: skip

    def __init__(self, settings: IngestSettings) -> None:
        self.settings = settings

    def config(self) -> dict[str, Any]:
        """Only what can change a byte: how work is cut into tasks is not part of it."""
        return self.settings.model_dump(exclude={"rows_per_task", "folder_files_per_task", "folder_mb_per_task"})

    def __call__(self, rows: pa.Table) -> pa.Table:
        answers, _ = self.examine([payload.as_py() for payload in rows["payload"]])
        named = [{"subject_id": subject, **answer} for subject, answer in zip(rows["subject_id"].to_pylist(), answers, strict=True)]
        return pa.Table.from_pylist(named, schema=self.schema)

    def examine(self, payloads: Sequence[bytes]) -> tuple[list[dict[str, Any]], pa.Table]:
        """One answer per payload, with the columns of `schema` but the subject; and rows of op_quality, one per good image
        in the order of the payloads. Each file is decoded once."""
        answers: list[dict[str, Any]] = []
        looks, ids, errors = Appearance(), [], []
        for payload in payloads:
            try:
                answer, pixels = self._one(payload)
            except images.BadImage as bad:
                answers.append({"error": bad.reason, "detail": bad.detail[:500]})
                continue
            except Exception as error:  # a decoder's own bug must cost one row, not the night
                answers.append({"error": "decoder_failed", "detail": f"{type(error).__name__}: {error}"[:500]})
                continue
            try:
                looks.add(pixels)
                errors.append(None)
            except Exception as error:
                errors.append(said(error))
            ids.append(answer["image_id"])
            answers.append(answer)
        return answers, quality_rows(ids, looks, errors)

    def _one(self, payload: bytes) -> tuple[dict[str, Any], np.ndarray]:
        decoded = images.decode(payload, self.settings)
        kept = payload if decoded.plain else images.encode_png(decoded.pixels)
        height, width = decoded.pixels.shape[:2]
        original = hashlib.sha256(payload).hexdigest()
        answer = {
            "image_id": original if decoded.plain else hashlib.sha256(kept).hexdigest(),
            "bytes": kept,
            "mime": decoded.mime if decoded.plain else "image/png",
            "width": width,
            "height": height,
            "stored": "original" if decoded.plain else "normalised",
            "original_mime": decoded.mime,
            "original_sha256": original,
            "notes": "; ".join(decoded.notes) or None,
            "error": None,
        }
        return answer, decoded.pixels


@dataclasses.dataclass(frozen=True)
class IngestTask:
    """A group of units for one worker; `replaces` names the (source, shard) among them that the lake holds in an earlier state."""

    units: tuple[Unit, ...]
    settings: IngestSettings
    version: str
    staging: str
    replaces: tuple[tuple[str, str], ...] = ()


def ingest_task(task: IngestTask) -> Written:
    """Runs on a worker: read the units, normalise their images, write one Parquet file per table."""
    operator = Ingest(task.settings)
    rows: dict[str, list[dict]] = {name: [] for name in TABLES}
    brought: list[tuple[Unit, list[Record], str | None]] = []
    for unit in task.units:
        try:
            brought.append((unit, sources.read(unit, task.settings), None))
        except sources.ShardError as error:
            brought.append((unit, [], str(error)))
    results, looks = _examine([record for _, records, _ in brought for record in records], operator)
    for unit, records, error in brought:
        failed = sum(_add_record(unit, record, results.pop(id(record), {}), rows, task.settings) for record in records)
        rows["op_shard"].append({
            "subject_id": f"{unit.source}/{unit.shard}", "source": unit.source, "shard": unit.shard, "digest": unit.digest,
            "rows": len(records), "failed": failed, "error": error,
        })  # fmt: skip
    tables = {name: stamp(name, schema.rows_table(name, found), task.version) for name, found in rows.items() if found}
    for name, key_column in schema.CONTENT_KEYS.items():
        if name in tables:
            tables[name] = first_of_each(tables[name], key_column)
    if "images" in tables:
        seen = first_of_each(looks, "subject_id")
        seen = seen.filter(pc.is_in(seen["subject_id"], tables["images"]["image_id"]))  # half a triplet is not stored
        tables["op_quality"] = stamp("op_quality", seen, op_version(Quality()))
    key = hashlib.sha256((task.version + "".join(unit.source + unit.shard + unit.digest for unit in task.units)).encode()).hexdigest()[:24]
    files = {name: write_table(name, table, Path(task.staging), key) for name, table in tables.items()}
    records_read = len(rows["op_ingest"])
    return Written(files, records_read, sum(row["error"] is not None for row in rows["op_ingest"]))


def first_of_each(rows: pa.Table, key: str) -> pa.Table:
    """The first row of each key, sorted by key: one order whatever order the source had."""
    first: dict[str, int] = {}
    for index, value in enumerate(rows[key].to_pylist()):
        first.setdefault(value, index)
    return rows.take(pa.array([first[value] for value in sorted(first)], pa.int64()))


def _examine(records: list[Record], operator: Ingest) -> tuple[dict[int, dict[str, dict]], pa.Table]:
    """{id of a record: {role: answer}} of all images of all records together, and their rows of op_quality: a file at a time would
    have the arithmetic of every single image pay for itself."""
    owners = [(record, role) for record in records if record.error is None for role in record.images]
    answers, looks = operator.examine([record.images[role] for record, role in owners])
    results: dict[int, dict[str, dict]] = {}
    for (record, role), answer in zip(owners, answers, strict=True):
        results.setdefault(id(record), {})[role] = answer
    return results, looks


def _add_record(unit: Unit, record: Record, found: dict[str, dict], rows: dict[str, list[dict]], limits: IngestSettings) -> bool:
    """Add the rows of one record; whether it failed."""
    for role, result in sorted(found.items()):
        if result["error"] and record.error is None:
            record.error = result["error"]
            record.detail = f"{role or 'image'}: {result['detail']}"
    _add_rows(unit, record, found, rows, limits)
    return record.error is not None


def _add_rows(unit: Unit, record: Record, found: dict[str, dict], rows: dict[str, list[dict]], limits: IngestSettings) -> None:
    record_id = f"{unit.source}/{record.key}" if unit.small else f"{unit.source}/{unit.shard}/{record.key}"
    entry: dict[str, Any] = {
        "subject_id": record_id, "source": unit.source, "domain": unit.domain, "shard": unit.shard, "source_key": record.key,
        "task": record.task, "shard_digest": unit.digest, "error": record.error, "detail": record.detail,
        "notes": "; ".join([*record.notes, *(f"{result['notes']}" for result in found.values() if result.get("notes"))]) or None,
        "image_id": None, "source_image_id": None, "caption_id": None, "edit_id": None,
    }  # fmt: skip
    rows["op_ingest"].append(entry)
    if record.error is not None:
        return
    for role, result in found.items():
        rows["images"].append({
            "image_id": result["image_id"], "bytes": result["bytes"], "mime": result["mime"], "width": result["width"],
            "height": result["height"], "size_bytes": len(result["bytes"]),
        })  # fmt: skip
        rows["provenance"].append({
            "image_id": result["image_id"], "record_id": record_id, "role": role, "source": unit.source, "shard": unit.shard,
            "source_key": record.key, "url": _text(record.metadata.get("url")),
            "licence": ingest_rows.licence_of(unit, record), "caption_raw": record.caption if role != "source" else None,
            "stored": result["stored"], "original_mime": result["original_mime"], "original_sha256": result["original_sha256"],
            "notes": result["notes"], "ingested_in": unit.digest, "origin": ingest_rows.origin_of(unit, record),
        })  # fmt: skip
    if record.task == "preference":
        entry["source_image_id"] = found["source"]["image_id"]
        ingest_rows.add_scores(record, record_id, ingest_rows.add_preference(unit, record, record_id, found, rows), rows)
        return
    if record.task == "edit":
        source, target = found["source"]["image_id"], found["target"]["image_id"]
        words = record.metadata["instruction"].strip()
        entry |= {"image_id": target, "source_image_id": source, "edit_id": edit_id(source, target, words)}
        rows["edits"].append({
            "edit_id": entry["edit_id"], "source_image_id": source, "target_image_id": target, "instruction": words,
            "edit_type": _text(record.metadata.get("edit_type")), "route": "provider",
            "parent_edit_id": _parent(record, source, target), **ingest_rows.session_of(unit, record),
        })  # fmt: skip
        size_px = (found["target"]["width"], found["target"]["height"])
        note = ingest_rows.add_mask(record, entry["edit_id"], size_px, rows, limits)
        entry["notes"] = "; ".join(filter(None, (entry["notes"], note))) or None
        ingest_rows.add_wordings(record, entry["edit_id"], rows)
        ingest_rows.add_captions(record, found, caption_id, rows)
        ingest_rows.add_scores(record, record_id, entry["edit_id"], rows)
        return
    entry["image_id"] = found[""]["image_id"]
    if record.caption is not None:
        entry["caption_id"] = caption_id(entry["image_id"], "provider", record.caption)
        rows["captions"].append({
            "caption_id": entry["caption_id"], "image_id": entry["image_id"], "style": "provider", "text": record.caption,
            "captioner": "provider",
        })  # fmt: skip
    ingest_rows.add_scores(record, record_id, entry["image_id"], rows)


def _parent(record: Record, source: str, target: str) -> str | None:
    """The edit that this one undoes, where the record says in which words; else the one that the provider names."""
    forward = _text(record.metadata.get("inverse_of"))
    return edit_id(target, source, forward) if forward else _text(record.metadata.get("parent_edit_id"))


def _text(value: Any) -> str | None:
    return value.strip() or None if isinstance(value, str) else None
