"""Measurements that compare rows with one another or with benchmarks: duplicates, alike meaning, contamination.
They run on the driver over narrow columns, read the history as columns too, and never a pixel of the lake."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dreamlite_data.lake import Lake
from dreamlite_data.operators.base import op_version, stamp
from dreamlite_data.operators.contamination import ENTRIES, BenchmarkError, Contamination, read_benchmark
from dreamlite_data.operators.duplicates import Duplicates, History
from dreamlite_data.operators.run import ROWS_HELD, make_current, pending, pending_files
from dreamlite_data.operators.semantic import Semantic, unit_vectors
from dreamlite_data.schema import TABLES
from dreamlite_data.settings import Benchmark, RefreshSettings
from dreamlite_data.sources.digests import DigestCache, file_digests

ROWS_AT_ONCE = 65_536
"""Embeddings and texts are wide: of those so many are held at a time. A cut into portions is no other result than a cut into
nights (see `grouping.join_groups`), and it is the same cut after a crash, for pending rows come sorted."""


def group_duplicates(lake: Lake, settings: RefreshSettings) -> dict[str, int]:
    """Put every measured image that has no group yet into one."""
    version = op_version(Duplicates)
    subjects = (
        "SELECT q.subject_id, q.pixel_hash, q.phash, least(i.width, i.height) AS min_side_px FROM current_quality q "
        "JOIN images i ON i.image_id = q.subject_id"
    )
    answer = {"rows": 0, "failed": 0}
    with _given_back(), pending_files(lake, subjects, Duplicates.table, version) as paths:
        if paths:
            written = lake.staging / f"{Duplicates.table}-{version}.parquet"
            with pq.ParquetWriter(written, TABLES[Duplicates.table], compression="zstd") as writer:
                for found in Duplicates(grouped_before(lake, version, paths)).portions(functools.partial(_portions, paths)):
                    writer.write_table(stamp(Duplicates.table, found, version))
                    answer["rows"] += len(found)
                    answer["failed"] += len(found) - found["error"].null_count
            lake.add_files({Duplicates.table: [written]})
    make_current(lake, Duplicates.name, version, Duplicates.config())
    return answer


@contextlib.contextmanager
def _given_back() -> Iterator[None]:
    """Arrow's memory from the system, which gets back at once what is free. Arrow's own allocator keeps it: good for shards of images, and
    for narrow columns in small portions more than all of them together."""
    usual = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(usual)


def _portions(paths: Sequence[str], columns: Sequence[str]) -> Iterator[pa.Table]:
    for path in paths:
        with pq.ParquetFile(path) as rows:
            for batch in rows.iter_batches(ROWS_HELD, columns=list(columns), use_threads=False):
                yield pa.Table.from_batches([batch])


def grouped_before(lake: Lake, version: str, paths: Sequence[str]) -> History:
    """What the new rows at `paths` may meet: the hashes of all images that were grouped, and names of groups where they are asked for."""
    known = f"(SELECT group_id, phash, pixel_hash FROM {Duplicates.table} WHERE op_version = $version AND group_id IS NOT NULL)"
    of_version = {"version": version}
    phash = lake.query(f"SELECT phash FROM {known} WHERE phash IS NOT NULL", of_version)["phash"].to_numpy()
    pixels = lake.query(
        f"SELECT min(group_id) AS group_id, pixel_hash FROM {known} JOIN read_parquet($paths) USING (pixel_hash) GROUP BY pixel_hash",
        {**of_version, "paths": list(paths)},
    )

    def groups(hashes: np.ndarray) -> pa.Table:
        return lake.query(
            f"SELECT min(group_id) AS group_id, phash FROM {known} SEMI JOIN met USING (phash) GROUP BY phash", of_version, met=pa.table({"phash": hashes})
        )

    return History(phash, pixels, groups)


def group_semantic(lake: Lake, settings: RefreshSettings) -> dict[str, int]:
    """Put every embedded image that has no group of its meaning yet into one. Does nothing unless refresh.semantic is on.
    Raises LookupError where nothing was embedded."""
    answer = {"rows": 0, "failed": 0}
    if not settings.semantic.enabled:
        return answer
    embedded = lake.query("SELECT op_version FROM current_versions WHERE name = 'embed'")["op_version"].to_pylist()
    if not embedded:
        raise LookupError("semantic duplicates need embeddings of the images: run the measurement 'embed' first, or set refresh.semantic.enabled: false")
    operator = Semantic(embedded[0], settings.semantic.max_distance, settings.semantic.cells)
    version = op_version(operator)
    subjects = "SELECT subject_id FROM op_embed SEMI JOIN images ON images.image_id = op_embed.subject_id WHERE op_version = $embed"
    waiting = pending(lake, subjects.replace("$embed", f"'{embedded[0]}'"), "op_semantic", version)
    for start in range(0, len(waiting), ROWS_AT_ONCE):
        rows = _vectors(lake, waiting.slice(start, ROWS_AT_ONCE), embedded[0])
        path = lake.files / "semantic" / f"{version}.npy"
        centroids = operator.centroids(unit_vectors(rows["vector"].drop_null()), path)
        found = operator(rows, centroids, functools.partial(_known_vectors, lake, version, embedded[0]))
        lake.append({"op_semantic": stamp("op_semantic", found, version)})
        answer["rows"] += len(found)
        answer["failed"] += len(found) - found["error"].null_count
    make_current(lake, operator.name, version, operator.config())
    return answer


def _vectors(lake: Lake, subjects: pa.Table, embed_version: str) -> pa.Table:
    return lake.query(
        "SELECT e.subject_id, e.vector FROM op_embed e SEMI JOIN subjects s ON s.subject_id = e.subject_id "
        "WHERE e.op_version = $embed ORDER BY e.subject_id",
        {"embed": embed_version},
        subjects=subjects,
    )


def _known_vectors(lake: Lake, version: str, embed_version: str, cells: list[int]) -> pa.Table:
    return lake.query(
        "SELECT s.group_id, s.cluster, e.vector FROM op_semantic s JOIN op_embed e ON e.subject_id = s.subject_id AND e.op_version = $embed "
        "WHERE s.op_version = $version AND list_contains($cells, s.cluster) ORDER BY s.subject_id",
        {"embed": embed_version, "version": version, "cells": cells},
    )


def find_contamination(lake: Lake, settings: RefreshSettings) -> dict[str, int]:
    """Compare every image, caption and instruction with the benchmarks of the settings that it was not compared with yet.
    Raises BenchmarkError for one that cannot be read."""
    answer = {"rows": 0, "failed": 0}
    if not settings.benchmarks:
        return answer
    operator = Contamination(_entries(lake, settings.benchmarks))
    version = op_version(operator)
    images = pending(
        lake,
        "SELECT i.image_id AS subject_id, q.pixel_hash, q.phash, least(i.width, i.height) AS min_side_px FROM images i "
        "JOIN current_quality q ON q.subject_id = i.image_id",
        operator.table,
        version,
    )
    if len(images):
        lake.append({operator.table: stamp(operator.table, operator.of_images(images), version)})
    texts = "SELECT caption_id AS subject_id, text FROM captions UNION ALL SELECT edit_id, instruction FROM edits"
    waiting = pending(lake, f"SELECT subject_id FROM ({texts})", operator.table, version)
    for start in range(0, len(waiting), ROWS_AT_ONCE):
        rows = lake.query(
            f"SELECT t.subject_id, t.text, plain_words(t.text) AS plain FROM ({texts}) t SEMI JOIN waiting w ON w.subject_id = t.subject_id "
            "ORDER BY t.subject_id",
            waiting=waiting.slice(start, ROWS_AT_ONCE),
        )
        lake.append({operator.table: stamp(operator.table, operator.of_texts(rows), version)})
    make_current(lake, operator.name, version, operator.config())
    return answer | {"rows": len(images) + len(waiting)}


def _entries(lake: Lake, benchmarks: tuple[Benchmark, ...]) -> pa.Table:
    digests = file_digests(lake.files)
    parts = [read_benchmark(benchmark, _digest(benchmark, digests), lake.files / "benchmarks") for benchmark in benchmarks]
    digests.save()
    return lake.query(
        "SELECT benchmark, entry, kind, CASE WHEN kind = 'text' THEN plain_words(value) ELSE value END AS value FROM entries",
        entries=pa.concat_tables(parts),
    ).cast(ENTRIES)


def _digest(benchmark: Benchmark, digests: DigestCache) -> str:
    """Of the names and contents of a benchmark's files."""
    path: Path = benchmark.path
    if not path.exists():
        raise BenchmarkError(f"the benchmark {benchmark.name!r} is not at {path}: correct refresh.benchmarks, or mount it")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return digests.of_files(path, files)


COMPARISONS: dict[str, Any] = {"duplicates": group_duplicates, "semantic": group_semantic, "contamination": find_contamination}
"""Each takes the lake and the settings, and gives how many rows it measured and how many of them failed."""
