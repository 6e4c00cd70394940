"""The rows of a publication: a dataset version's rows with their licences, cut into splits and shards before anything is written.
Images are read shard by shard, so memory holds one row group and not the dataset."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dreamlite_data.dataset import Dataset, DatasetError, image_places
from dreamlite_data.lake import Lake
from dreamlite_data.operators.base import fetch
from dreamlite_data.policies.splits import split_order
from dreamlite_data.publishing.licences import Licence, combined, find_licence, row_licences, strictest
from dreamlite_data.publishing.materials import WALK, row_materials

TASKS = ("generate", "edit")
SHARD_BYTES = 500 * 10**6
GROUP_ROWS = 100
GROUP_BYTES = 16 * 2**20
"""The hub's viewer reads whole row groups and refuses large ones: it wants at most some 100 rows or 16 MB in one."""


@dataclasses.dataclass(frozen=True)
class PublishedRows:
    """`rows` are the dataset's columns and licence (as stated, joined by '; '), source, url, width, height, mime of the target and
    size_bytes of both images; sorted by row_id. A composite's licence is the one of the whole, and its made_of says photo and cut-outs
    with theirs. `left_out` counts rows by (licence, why). `licences` are those of the kept rows, `pasted` counts rows by (origin,
    licence) of the cut-outs in them."""

    dataset: Dataset
    rows: pa.Table
    left_out: dict[tuple[str, str], int]
    licences: list[Licence]
    pasted: dict[tuple[str, str], int]


@dataclasses.dataclass(frozen=True)
class Shard:
    """Rows `start` to `stop` of the rows of one task and split; number `index` of `count`."""

    task: str
    split: str
    index: int
    count: int
    rows: pa.Table

    @property
    def stem(self) -> str:
        """'train-00000-of-00003'."""
        return f"{self.split}-{self.index:05d}-of-{self.count:05d}"


def select_rows(lake: Lake, dataset: Dataset, include_restricted: bool) -> PublishedRows:
    """The rows that may be published. Raises DatasetError where none may."""
    _refuse_unknown_parts(dataset)
    stated, materials = row_licences(lake, dataset.rows), row_materials(lake, dataset.rows)
    deciding = [
        combined([strictest(texts), *(find_licence(part.licence) for part in parts)]) if parts else strictest(texts)
        for texts, parts in zip(stated, materials, strict=True)
    ]
    publish = [include_restricted or licence.publish for licence in deciding]
    left_out: dict[tuple[str, str], int] = {}
    for licence, kept in zip(deciding, publish, strict=True):
        if not kept:
            key = (licence.name, licence.why)
            left_out[key] = left_out.get(key, 0) + 1
    words = ["; ".join(text or "unknown" for text in texts) or "unknown" for texts in stated]
    rows = dataset.rows.append_column("licence", pa.array([
        licence.name if parts else text for licence, parts, text in zip(deciding, materials, words, strict=True)
    ]))  # fmt: skip
    rows = rows.append_column("made_of", pa.array([
        "; ".join([f"photo ({text})", *map(str, parts)]) if parts else None for parts, text in zip(materials, words, strict=True)
    ], pa.string()))  # fmt: skip
    rows = rows.filter(pa.array(publish, pa.bool_()))
    if not len(rows):
        said = ", ".join(f"{n} {name} ({why})" for (name, why), n in sorted(left_out.items()))
        raise DatasetError(
            f"no row of {dataset.name}@{dataset.version} may be published: {said or 'it is empty'}. State the licence of the source "
            "(refresh.extra_sources[].licence, or 'licence' in its metadata; of cut-outs refresh.composite.licence), or add --include-restricted where you hold the rights"
        )
    licences = sorted(
        {
            licence
            for texts, parts, decided, kept in zip(stated, materials, deciding, publish, strict=True) if kept
            for licence in ([decided] if parts else [find_licence(text) for text in (texts or [None])])
        },
        key=lambda licence: licence.name,
    )  # fmt: skip
    pasted = Counter(
        found for parts, kept in zip(materials, publish, strict=True) if kept for found in {(part.origin, part.licence) for part in parts}
    )
    return PublishedRows(dataset, _with_facts(lake, rows), dict(sorted(left_out.items())), licences, dict(sorted(pasted.items())))


def _refuse_unknown_parts(dataset: Dataset) -> None:
    """Splits become file names and tasks choose columns; a policy of a user's own may have written anything there."""
    for column, fits in (("split", lambda text: re.fullmatch(r"[A-Za-z0-9_]{1,40}", text)), ("task", lambda text: text in TASKS)):
        wrong = [text for text in set(dataset.rows[column].to_pylist()) if text is None or not fits(text)]
        if wrong:
            raise DatasetError(f"{dataset.name}@{dataset.version} has rows whose {column} is {wrong[0]!r}, which cannot be published")


def _with_facts(lake: Lake, rows: pa.Table) -> pa.Table:
    names = ", ".join(f"r.{name}" for name in rows.column_names)
    return lake.query(
        f"WITH RECURSIVE {WALK}, "
        "walked AS (SELECT w.row_id, min(p.source) AS source FROM walk w JOIN provenance p ON p.image_id = w.image_id GROUP BY w.row_id), "
        "origin AS (SELECT record_id, min(source) AS source, min(url) AS url FROM provenance GROUP BY record_id), "
        "by_image AS (SELECT image_id, min(source) AS source FROM provenance GROUP BY image_id) "
        f"SELECT {names}, coalesce(o.source, s.source, t.source, k.source) AS source, o.url, i.width, i.height, i.mime, j.mime AS source_mime, "
        "i.size_bytes + coalesce(j.size_bytes, 0) AS size_bytes "
        "FROM r JOIN images i ON i.image_id = r.image_id LEFT JOIN images j ON j.image_id = r.source_image_id "
        "LEFT JOIN origin o ON o.record_id = split_part(r.row_id, '#', 1) "
        "LEFT JOIN by_image s ON s.image_id = r.source_image_id LEFT JOIN by_image t ON t.image_id = r.image_id "
        "LEFT JOIN walked k ON k.row_id = r.row_id ORDER BY r.row_id",
        r=rows,
    )


def cut_shards(rows: pa.Table, shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """The rows by task and split (train, validation, test, others), each cut where the images of a shard reach `shard_bytes`."""
    shards = []
    splits = sorted(set(rows["split"].to_pylist()), key=split_order)
    for task in sorted(set(rows["task"].to_pylist())):
        of_task = rows.filter(pc.equal(rows["task"], task))
        for split in splits:
            part = of_task.filter(pc.equal(of_task["split"], split))
            bounds = _bounds(part["size_bytes"].to_pylist(), len(part) or 1, shard_bytes)
            shards += [
                Shard(task, split, index, len(bounds), part.slice(start, stop - start)) for index, (start, stop) in enumerate(bounds)
            ]
    return shards


def _bounds(sizes: list[int], max_rows: int, max_bytes: int) -> list[tuple[int, int]]:
    bounds, start, total = [], 0, 0
    for index, size in enumerate(sizes):
        if index > start and (total + size > max_bytes or index - start >= max_rows):
            bounds.append((start, index))
            start, total = index, 0
        total += size
    return [*bounds, (start, len(sizes))] if sizes else []


def row_groups(lake: Lake, rows: pa.Table) -> Iterator[list[dict[str, Any]]]:
    """`rows` in groups of at most GROUP_ROWS rows and about GROUP_BYTES, as dicts with image_bytes and source_bytes."""
    ids = sorted({image_id for column in ("image_id", "source_image_id") for image_id in rows[column].to_pylist() if image_id})
    places = image_places(lake, ids)
    for start, stop in _bounds(rows["size_bytes"].to_pylist(), GROUP_ROWS, GROUP_BYTES):
        group = rows.slice(start, stop - start).to_pylist()
        wanted = sorted({image_id for row in group for image_id in (row["image_id"], row["source_image_id"]) if image_id})
        payloads = dict(zip(wanted, fetch(places, wanted), strict=True))
        yield [{**row, "image_bytes": payloads[row["image_id"]], "source_bytes": payloads.get(row["source_image_id"])} for row in group]
