"""Forget an image: remove it and everything made from it, from every table, version, cache and file, and prove that it is gone.
Time travel would keep it, so every snapshot that could still see it is expired; older and newer snapshots stay."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from dreamlite_data import erasure, schema
from dreamlite_data.dataset import read_images
from dreamlite_data.images import decode_stored
from dreamlite_data.lake import Lake, LakeError, insert, register_files
from dreamlite_data.operators.base import write_table
from dreamlite_data.policies.curate import ROW_COLUMNS, rows_digest
from dreamlite_data.tombstones import FORGOTTEN, failure, id_columns, pixel_digest

UNTOUCHED = ("takedowns", "tombstones", "policies", "op_shard")
"""Tables that name forgotten images on purpose, or hold nothing that is made from an image."""
KEPT_AS_FAILURES = {"op_ingest": failure, "op_download": lambda why: {
    "sha256": None, "size_bytes": None, "etag": None, "permanent": True, "error": FORGOTTEN, "detail": why,
}}  # fmt: skip
"""Rows about what a source has stay, as the failures that a later refresh would make of them: it must not ask for them again."""
TEXT_COLUMNS = ("text", "instruction", "caption_raw")
"""Columns with words about an image: those of a forgotten one are looked for afterwards, unless another row has the same."""


@dataclasses.dataclass(frozen=True)
class Takedown:
    """What a takedown removes, or with `proof` None would remove. `images` are all forgotten ones, `derived` those among them
    that operators made; `rows` counts removed rows by table; `datasets` are the versions that lose rows, `new_versions` the ones
    made without them; `checkpoints` learned from them and need retraining; `sources` still hold the files that were read."""

    takedown_id: str
    images: list[str]
    derived: list[str]
    rows: dict[str, int]
    files_rewritten: int
    datasets: list[str]
    new_versions: list[str]
    checkpoints: list[str]
    sources: list[str]
    expired_snapshots: list[int]
    cached_files: int
    proof: str | None


@dataclasses.dataclass(frozen=True)
class _Doomed:
    images: list[str]
    derived: list[str]
    ids: list[str]

    def table(self) -> pa.Table:
        return pa.table({"id": pa.array(self.ids, pa.string())})


def forget(lake: Lake, image_ids: Sequence[str], reason: str, near: bool = False, dry_run: bool = False) -> Takedown:
    """Forget images by id; with `near` also all of their groups of duplicates. `dry_run` only says what that would remove.
    A takedown that was cut off is brought to its end first. Raises LakeError for an unknown id, an empty reason, or where the
    scan afterwards still finds something."""
    if not reason.strip():
        raise LakeError("a takedown needs a reason: it is what a later refresh answers when the image comes back (--reason)")
    if dry_run:
        doomed = _doomed(lake, image_ids, near)
        return _describe(lake, doomed, "dry-run", _affected(lake, doomed))
    with lake.exclusive("refresh"), lake.exclusive("write"):
        finish_takedowns(lake)
        doomed = _doomed(lake, image_ids, near)
        takedown_id = f"takedown-{uuid.uuid4().hex[:12]}"
        affected = _affected(lake, doomed)
        planned = _describe(lake, doomed, takedown_id, affected)
        _remove(lake, doomed, planned, affected, sorted(set(image_ids)), reason.strip())
        proofs = finish_takedowns(lake)
        cached = sum(proof.cached_files for proof in proofs)
        return dataclasses.replace(
            planned, expired_snapshots=[s for proof in proofs for s in proof.expired_snapshots], cached_files=cached, proof=proofs[-1].proof
        )


# --- what it takes with it -------------------------------------------------------------------------------------------


def _doomed(lake: Lake, image_ids: Sequence[str], near: bool) -> _Doomed:
    asked = pa.table({"image_id": pa.array(sorted(set(image_ids)), pa.string())})
    known = lake.query("SELECT image_id FROM images SEMI JOIN a USING (image_id)", a=asked)["image_id"].to_pylist()
    unknown = sorted(set(image_ids) - set(known))
    if unknown:
        done = lake.query("SELECT image_id FROM tombstones SEMI JOIN a USING (image_id)", a=asked)["image_id"].to_pylist()
        said = "was forgotten before" if unknown[0] in done else "is not in it (an id is the sha256 of the stored bytes, 64 hex digits)"
        raise LakeError(f"the lake at {lake.root} has no image {unknown[0]}: it {said}")
    if near:
        groups = "SELECT group_id FROM duplicates SEMI JOIN a USING (image_id)"
        members = f"SELECT image_id FROM duplicates WHERE group_id IN ({groups})"
        asked = lake.query(f"SELECT image_id FROM a UNION {members} ORDER BY ALL", a=asked)
    # What an operator made has no provenance of its own. It goes whichever side of the edit it stands on, and with the photo that a
    # route worked on: of a composite both pictures may be made.
    images = lake.query(
        "WITH RECURSIVE links AS (SELECT source_image_id AS here, target_image_id AS there FROM edits WHERE coalesce(route, '') <> 'provider' "
        "UNION ALL SELECT target_image_id, source_image_id FROM edits WHERE coalesce(route, '') <> 'provider' "
        "UNION ALL SELECT o.subject_id, unnest([e.source_image_id, e.target_image_id]) FROM (SELECT subject_id, unnest(edit_ids) AS edit_id "
        "FROM op_edit) o JOIN edits e ON e.edit_id = o.edit_id), "
        "walk(image_id) AS (SELECT image_id FROM a UNION SELECT l.there FROM walk w JOIN links l ON l.here = w.image_id "
        "WHERE l.there NOT IN (SELECT image_id FROM provenance)) SELECT image_id FROM walk ORDER BY image_id",
        a=asked,
    )
    content = lake.query(
        "SELECT caption_id AS id FROM captions SEMI JOIN i USING (image_id) UNION SELECT edit_id FROM edits WHERE source_image_id IN "
        "(FROM i) OR target_image_id IN (FROM i) ORDER BY ALL",
        i=images,
    )["id"].to_pylist()
    records = lake.query(
        "SELECT subject_id AS id FROM op_ingest WHERE image_id IN (FROM i) OR source_image_id IN (FROM i) "
        "UNION SELECT record_id FROM provenance WHERE image_id IN (FROM i) ORDER BY ALL",
        i=images,
    )["id"].to_pylist()
    originals = lake.query("SELECT DISTINCT original_sha256 AS id FROM provenance WHERE image_id IN (FROM i) AND id IS NOT NULL", i=images)
    found = images["image_id"].to_pylist()
    derived = sorted(set(found) - set(asked["image_id"].to_pylist()))
    rows_of_records = [name for record in records for name in (record, f"{record}#scene")]
    return _Doomed(found, derived, sorted({*found, *content, *rows_of_records, *originals["id"].to_pylist()}))


def _naming(table: str) -> str:
    """SQL: this row of `table` is about something doomed (a registered table `doomed` of ids)."""
    columns = [*id_columns(table), *({"sha256"} & set(schema.TABLES[table].names))]
    return "(" + " OR ".join(f"coalesce({name} IN (SELECT id FROM doomed), false)" for name in columns) + ")"


def _tables() -> list[str]:
    return [name for name in schema.TABLES if name not in UNTOUCHED and id_columns(name)]


@dataclasses.dataclass(frozen=True)
class _File:
    """A Parquet file that physically holds a doomed row. `live` says that the newest snapshot reads it."""

    table: str
    path: Path
    live: bool
    begin_snapshot: int


def _affected(lake: Lake, doomed: _Doomed) -> list[_File]:
    """Found in the files and not in the tables, because a row that was deleted earlier still lies in its file."""
    files = []
    for table in _tables():
        known = erasure.data_files(lake, table)
        if not known:
            continue
        paths = [str(path) for path, _, _ in known]
        hit = lake.query(
            f"SELECT DISTINCT filename FROM read_parquet($paths, filename = true, union_by_name = true) WHERE {_naming(table)}",
            {"paths": paths},
            doomed=doomed.table(),
        )["filename"].to_pylist()
        files += [_File(table, path, live, begin) for path, live, begin in known if str(path) in set(hit)]
    return files


def _describe(lake: Lake, doomed: _Doomed, takedown_id: str, affected: list[_File]) -> Takedown:
    ids = doomed.table()
    tables = sorted({file.table for file in affected})
    rows = {table: lake.query(f"SELECT count(*) AS n FROM {table} WHERE {_naming(table)}", doomed=ids)["n"][0].as_py() for table in tables}
    versions = lake.query(
        f"SELECT DISTINCT name, version FROM dataset_rows WHERE {_naming('dataset_rows')} ORDER BY ALL", doomed=ids
    ).to_pylist()
    newest = {row["name"]: row["version"] for row in lake.query("SELECT name, version FROM latest_datasets").to_pylist()}
    datasets = [f"{row['name']}@{row['version']}" for row in versions]
    made = [f"{row['name']}@{row['version'] + 1}" for row in versions if newest[row["name"]] == row["version"]]
    learned = lake.query(
        "WITH RECURSIVE down(kind, id) AS (SELECT child_kind, child_id FROM lineage WHERE list_contains($names, parent_id) "
        "UNION SELECT l.child_kind, l.child_id FROM lineage l JOIN down d ON l.parent_id = d.id) "
        "SELECT DISTINCT id FROM down WHERE kind IN ('checkpoint', 'artifact') ORDER BY id",
        {"names": datasets},
    )["id"].to_pylist()
    sources = lake.query(
        "SELECT DISTINCT source || '/' || shard || CASE WHEN source_key = shard THEN '' ELSE ': ' || source_key END AS place "
        "FROM provenance WHERE image_id IN (SELECT id FROM doomed) ORDER BY place",
        doomed=ids,
    )["place"].to_pylist()
    return Takedown(
        takedown_id, doomed.images, doomed.derived, {name: count for name, count in rows.items() if count},
        sum(file.live for file in affected), datasets, made, learned, sources, [], 0, None,
    )  # fmt: skip


# --- removing it -----------------------------------------------------------------------------------------------------


def _remove(lake: Lake, doomed: _Doomed, planned: Takedown, affected: list[_File], asked: list[str], reason: str) -> None:
    """One transaction: tombstones, the request, each affected file without the doomed rows, and new dataset versions."""
    live = [file for file in affected if file.live]
    stones, digests = _tombstones(lake, doomed, planned.takedown_id, reason), _lone_texts(lake, doomed)
    fresh = _new_versions(lake, doomed)
    replaced = {file: _without_doomed(lake, doomed, file, f"forgotten by takedown {planned.takedown_id}: {reason}") for file in live}
    first_seen = min((file.begin_snapshot for file in affected), default=lake.snapshot())
    request = {
        "takedown_id": planned.takedown_id, "reason": reason, "requested_at": datetime.now(UTC), "rows_removed": sum(planned.rows.values()),
        "files_rewritten": planned.files_rewritten, "datasets": planned.datasets, "checkpoints": planned.checkpoints,
        "expired_snapshots": [first_seen], "text_digests": digests, "proof": None,
    }  # fmt: skip
    requests = schema.rows_table("takedowns", [{**request, "image_id": image_id} for image_id in asked])

    def body(connection: Any) -> None:
        for file, path in replaced.items():
            place = str(file.path)
            connection.execute(f"DELETE FROM {file.table} WHERE rowid IN (SELECT rowid FROM {file.table} WHERE filename = ?)", [place])
            if path is not None:
                register_files(connection, {file.table: [path]})
        insert(connection, {"tombstones": stones, "takedowns": requests, **fresh})

    lake.write(body)


def _tombstones(lake: Lake, doomed: _Doomed, takedown_id: str, reason: str) -> pa.Table:
    """One row for each form in which an image came: two files with other bytes may have become the same stored image."""
    rows = lake.query(
        "SELECT DISTINCT i.image_id, p.original_sha256, i.width, i.height FROM images i LEFT JOIN provenance p ON p.image_id = i.image_id "
        "WHERE i.image_id IN (SELECT id FROM doomed) ORDER BY ALL",
        doomed=doomed.table(),
    ).to_pylist()
    pixels = {image_id: pixel_digest(decode_stored(payload)) for image_id, payload in read_images(lake, doomed.images).items()}
    made = {"takedown_id": takedown_id, "reason": reason}
    return schema.rows_table("tombstones", [{**row, "pixel_sha256": pixels[row["image_id"]], **made} for row in rows])


def _lone_texts(lake: Lake, doomed: _Doomed) -> list[str]:
    """sha256 of the words that only doomed rows hold. Words that another row has as well stay, and prove nothing."""
    gone, stay = [], []
    for table in _tables():
        for column in set(TEXT_COLUMNS) & set(schema.TABLES[table].names):
            gone.append(f"SELECT {column} AS words FROM {table} WHERE {column} IS NOT NULL AND {_naming(table)}")
            stay.append(f"SELECT {column} AS words FROM {table} WHERE {column} IS NOT NULL AND NOT {_naming(table)}")
    texts = lake.query(f"(({' UNION '.join(gone)}) EXCEPT ({' UNION '.join(stay)})) ORDER BY words", doomed=doomed.table())
    return [erasure.text_digest(text) for text in texts["words"].to_pylist()]


def _without_doomed(lake: Lake, doomed: _Doomed, file: _File, why: str) -> Path | None:
    """A new file with the live rows of `file` that stay, in their order, placed in the lake's data; None where none does.
    What a source has of a forgotten image stays as a failure that says why."""
    keep = KEPT_AS_FAILURES.get(file.table)
    rows = lake.query(
        f"SELECT {', '.join(schema.TABLES[file.table].names)}, {_naming(file.table)} AS is_doomed FROM {file.table} WHERE filename = $file "
        "AND (NOT is_doomed OR $keep) ORDER BY file_row_number",
        {"file": str(file.path), "keep": keep is not None},
        doomed=doomed.table(),
    )
    if keep is not None:
        rows = pa.Table.from_pylist([row | (keep(why) if row["is_doomed"] else {}) for row in rows.to_pylist()], schema=rows.schema)
    rows = rows.drop_columns(["is_doomed"])
    if not len(rows):
        return None
    key = hashlib.sha256(f"{file.path.name}{why}".encode()).hexdigest()[:24]
    return lake.place(file.table, Path(write_table(file.table, schema.conform(file.table, rows), lake.staging, key)))


def _new_versions(lake: Lake, doomed: _Doomed) -> dict[str, pa.Table]:
    """Rows of `datasets`, `dataset_rows`, `decisions`, `policy_rules` and `lineage` for the newest version of each dataset that
    held something doomed, without it. Older versions keep number and digest and lose the rows."""
    held = lake.query(
        "SELECT d.* FROM latest_datasets d WHERE EXISTS (SELECT 1 FROM dataset_rows r WHERE r.name = d.name AND r.version = d.version "
        f"AND {_naming('dataset_rows')}) ORDER BY d.name",
        doomed=doomed.table(),
    ).to_pylist()
    tables: dict[str, list[pa.Table]] = {}
    renamed = {f"{row['name']}@{row['version']}": f"{row['name']}@{row['version'] + 1}" for row in held}
    for row in held:
        key, values = row["version"] + 1, {"name": row["name"], "version": row["version"]}
        rows = schema.conform("dataset_rows", lake.query(
            f"SELECT * FROM dataset_rows WHERE name = $name AND version = $version AND NOT {_naming('dataset_rows')} ORDER BY row_id",
            values,
            doomed=doomed.table(),
        ))  # fmt: skip
        for table, where in (("decisions", f" AND NOT {_naming('decisions')}"), ("policy_rules", "")):
            copied = lake.query(f"SELECT * FROM {table} WHERE dataset = $name AND version = $version{where}", values, doomed=doomed.table())
            tables.setdefault(table, []).append(_numbered(table, copied, key))
        parents = lake.query(
            "SELECT parent_id FROM lineage WHERE child_kind = 'dataset' AND child_id = $id AND role = 'drawn_from' ORDER BY parent_id",
            {"id": f"{row['name']}@{row['version']}"},
        )["parent_id"].to_pylist()
        tables.setdefault("dataset_rows", []).append(_numbered("dataset_rows", rows, key))
        tables.setdefault("datasets", []).append(schema.rows_table("datasets", [{
            **row, "version": key, "digest": rows_digest(rows.select(ROW_COLUMNS)), "parent": row["version"], "snapshot": lake.snapshot(),
            "rows": len(rows),
        }]))  # fmt: skip
        edge = {"child_kind": "dataset", "child_id": f"{row['name']}@{key}", "parent_kind": "dataset"}
        tables.setdefault("lineage", []).append(
            schema.rows_table("lineage", [{**edge, "parent_id": renamed.get(parent, parent), "role": "drawn_from"} for parent in parents])
        )
    joined = {name: pa.concat_tables(parts) for name, parts in tables.items()}
    return {name: rows for name, rows in joined.items() if len(rows)}


def _numbered(table: str, rows: pa.Table, version: int) -> pa.Table:
    place = rows.column_names.index("version")
    return schema.conform(table, rows.set_column(place, "version", pa.array([version] * len(rows), pa.int32())))


# --- finishing: files, caches, proof ---------------------------------------------------------------------------------


def finish_takedowns(lake: Lake) -> list[erasure.Erased]:
    """Erase and prove every takedown whose rows are removed and whose files may still be there, as after a crash."""
    open_ones = lake.query(
        "SELECT takedown_id, any_value(expired_snapshots) AS seen, any_value(text_digests) AS digests FROM takedowns WHERE proof IS NULL "
        "GROUP BY takedown_id ORDER BY takedown_id"
    ).to_pylist()
    answers = []
    for row in open_ones:
        images = lake.query(
            "SELECT DISTINCT image_id FROM tombstones WHERE takedown_id = $id ORDER BY image_id", {"id": row["takedown_id"]}
        )["image_id"].to_pylist()
        tables = [name for name in schema.TABLES if name not in UNTOUCHED]
        erased = erasure.erase(lake, images, set(row["digests"]), min(row["seen"]), tables)
        if erased.left:
            raise LakeError(
                f"{row['takedown_id']} is not finished: something of the forgotten images is still in {', '.join(erased.left[:5])}. Close "
                "other programs that hold the lake open and run the same command again"
            )
        _prove(lake, row["takedown_id"], erased)
        answers.append(erased)
    return answers


def _prove(lake: Lake, takedown_id: str, erased: erasure.Erased) -> None:
    values = [erased.proof, json.dumps(erased.expired_snapshots), takedown_id]
    lake.write(
        lambda connection: connection.execute(
            "UPDATE takedowns SET proof = ?, expired_snapshots = CAST(? AS JSON)::BIGINT[] WHERE takedown_id = ?", values
        )
    )
