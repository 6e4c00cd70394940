"""Images that were forgotten and must not come back: how they are recognised, and how a worker's rows are freed of them.
Every commit of measured rows passes here; while nothing was ever forgotten, that is one query and no more."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dreamlite_data import schema
from dreamlite_data.images import decode_stored
from dreamlite_data.lake import Lake

if TYPE_CHECKING:
    from dreamlite_data.operators.base import Written

FORGOTTEN = "forgotten"
"""The error of a record whose image was forgotten."""
_ID_NAMES = ("subject_id", "caption_id", "edit_id", "record_id", "row_id")


def id_columns(table: str) -> list[str]:
    """The columns of `table` that name an image, or something made from one."""
    return [name for name in schema.TABLES[table].names if name in _ID_NAMES or name.endswith("image_id")]


def pixel_digest(pixels: np.ndarray) -> str:
    """Digest of uint8 [H, W, 3] pixels: equal for every encoding of the same picture."""
    height, width = pixels.shape[:2]
    return hashlib.sha256(f"{width}x{height}:".encode() + pixels.tobytes()).hexdigest()


def free_of_forgotten(lake: Lake, results: Sequence[Written]) -> Sequence[Written]:
    """What workers wrote without the images that were forgotten and all that names them; the files are rewritten in place.
    A record of a source that brings such an image becomes a row with the error 'forgotten' and the reason."""
    if not any({"images", "provenance"} & written.files.keys() for written in results):
        return results
    stones = lake.query("SELECT image_id, original_sha256, pixel_sha256, width, height, takedown_id, reason FROM tombstones").to_pylist()
    return [_free_of(stones, written) for written in results] if stones else results


def _free_of(stones: list[dict[str, Any]], written: Written) -> Written:
    tables = {name: pq.read_table(path) for name, path in written.files.items()}
    refused = _refused(tables, stones)
    if not refused:
        return written
    return _rewrite(written, tables, refused)


def _refused(tables: dict[str, pa.Table], stones: list[dict[str, Any]]) -> dict[str, str]:
    """{image id: why} of the images that a tombstone names by stored bytes, by bytes as they came, or by pixels."""
    why = {stone["image_id"]: _sentence(stone) for stone in stones}
    found: dict[str, str] = {}
    if "images" in tables:
        sizes = {(stone["width"], stone["height"]) for stone in stones if stone["pixel_sha256"]}
        by_pixels = {stone["pixel_sha256"]: _sentence(stone) for stone in stones if stone["pixel_sha256"]}
        images = tables["images"]
        for index, (image_id, width, height) in enumerate(
            zip(*(images[name].to_pylist() for name in ("image_id", "width", "height")), strict=True)
        ):
            if image_id in why:
                found[image_id] = why[image_id]
            elif (width, height) in sizes:  # only a picture of the same size can have the same pixels
                digest = pixel_digest(decode_stored(images["bytes"][index].as_py()))
                if digest in by_pixels:
                    found[image_id] = by_pixels[digest]
    if "provenance" in tables:
        by_original = {stone["original_sha256"]: _sentence(stone) for stone in stones if stone["original_sha256"]}
        for image_id, original in zip(*(tables["provenance"][name].to_pylist() for name in ("image_id", "original_sha256")), strict=True):
            if image_id in why or original in by_original:
                found[image_id] = why.get(image_id) or by_original[original]
    return found


def _sentence(stone: dict[str, Any]) -> str:
    return f"forgotten by takedown {stone['takedown_id']}: {stone['reason']}"


def _rewrite(written: Written, tables: dict[str, pa.Table], refused: dict[str, str]) -> Written:
    from dreamlite_data.operators.base import write_table  # operators.run imports this module

    records = _records(tables, refused)
    gone = {*refused, *_ids(tables.get("captions"), "caption_id", refused), *_ids(tables.get("edits"), "edit_id", refused)}
    files, failed = dict(written.files), 0
    kept_images = set(tables["provenance"].filter(_not_naming(tables["provenance"], ["record_id"], records))["image_id"].to_pylist()) \
        if "provenance" in tables else None  # fmt: skip
    for name, rows in tables.items():
        if name == "op_ingest":
            rest = _as_failures(rows, records)
            failed = len(records)
        elif name == "provenance":
            rest = rows.filter(_not_naming(rows, ["record_id", "image_id"], {*records, *gone}))
        elif name == "images" and kept_images is not None:
            rest = rows.filter(pc.is_in(rows["image_id"], pa.array(sorted(kept_images - gone), pa.string())))
        else:
            rest = rows.filter(_not_naming(rows, id_columns(name), {*gone, *records}))
        if not len(rest):
            Path(files.pop(name)).unlink()
        elif rest is not rows:
            path = Path(files[name])
            files[name] = write_table(name, rest, path.parent, path.stem.removeprefix(f"{name}-"))
    return dataclasses.replace(written, files=files, failed=written.failed + failed)


def _records(tables: dict[str, pa.Table], refused: dict[str, str]) -> dict[str, str]:
    """{record id: why} of the records that bring a refused image."""
    if "provenance" not in tables:
        return {}
    pairs = zip(*(tables["provenance"][name].to_pylist() for name in ("record_id", "image_id")), strict=True)
    return {record: refused[image_id] for record, image_id in pairs if image_id in refused}


def _ids(rows: pa.Table | None, key: str, refused: dict[str, str]) -> list[str]:
    if rows is None:
        return []
    columns = [name for name in rows.column_names if name.endswith("image_id")]
    return rows.filter(pc.invert(_not_naming(rows, columns, refused)))[key].to_pylist()


def _not_naming(rows: pa.Table, columns: list[str], ids: Any) -> pa.ChunkedArray:
    wanted = pa.array(sorted(ids), pa.string())
    naming = pa.chunked_array([pa.array(np.zeros(len(rows), bool))])
    for column in columns:
        naming = pc.or_(naming, pc.is_in(rows[column], wanted))
    return pc.invert(naming)


def _as_failures(rows: pa.Table, records: dict[str, str]) -> pa.Table:
    """`op_ingest` rows with those of `records` turned into failures that name no image."""
    answers = []
    for row in rows.to_pylist():
        if row["subject_id"] in records:
            row |= failure(records[row["subject_id"]])
        answers.append(row)
    return pa.Table.from_pylist(answers, schema=rows.schema)


def failure(why: str) -> dict[str, Any]:
    """What a record of a forgotten image looks like in `op_ingest`."""
    return {
        "image_id": None, "source_image_id": None, "caption_id": None, "edit_id": None, "notes": None, "error": FORGOTTEN, "detail": why,
    }  # fmt: skip
