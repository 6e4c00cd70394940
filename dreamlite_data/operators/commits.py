"""Register what workers wrote: in one transaction, content once, without what was forgotten.
Committing never takes more than a tenth of the time: what is finished meanwhile goes into the next commit together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dreamlite_data import schema
from dreamlite_data.lake import Lake, register_files
from dreamlite_data.operators.base import Written, write_table
from dreamlite_data.tombstones import free_of_forgotten

REST = 10.0
"""Between two commits passes at least so many times what the last one took. A commit looks through the ids of all that the lake has
and through the list of its files, so its cost grows with the lake; one for each result would make a large build slower and slower."""

CORRECTED = ("edits", "edit_masks")
"""Tables that tell what a provider says of a triplet beside the triplet itself."""
TRIPLET_TABLES = ("op_verify_edit", "op_triplet_measures", "op_edit_question", "op_verify_triplet")
"""What is measured of a triplet by its type and mask."""


class Commits:
    """Commits results in the order in which they come.

    >>> with Commits(lake) as commits:
    ...     for written in executor.map(run_task, tasks):
    ...         commits.add(written)

    What was added when an error ends the work is committed too.
    """

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        self._held: list[Written] = []
        self._ended = self._took = 0.0

    def add(self, written: Written, withdraw: Sequence[tuple[str, str]] = ()) -> None:
        """Commit a result, now or with the next. One that takes the place of earlier records, see `commit`, goes alone."""
        if withdraw:
            self.flush()
            commit(self._lake, [written], withdraw)
            return
        self._held.append(written)
        if time.monotonic() - self._ended >= REST * self._took:
            self.flush()

    def flush(self) -> None:
        """Commit what is held."""
        if not self._held:
            return
        held, self._held = self._held, []
        started = time.monotonic()
        commit(self._lake, held)
        self._ended = time.monotonic()
        self._took = self._ended - started

    def __enter__(self) -> Commits:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.flush()


def commit(lake: Lake, results: Sequence[Written], withdraw: Sequence[tuple[str, str]] = ()) -> None:
    """Register what workers wrote, in one transaction. Content that the lake or an earlier one of the `results` has already is left
    out, and so is what was forgotten. `withdraw` names (source, shard) whose earlier records go in the same transaction; what the
    results bring anew of a triplet that is known, a corrected type or mask, takes the place of what was, and its measurements are
    pending again."""
    written_files: dict[str, list[Path]] = {}
    for written in free_of_forgotten(lake, results):
        for name, path in written.files.items():
            written_files.setdefault(name, []).append(Path(path))
    corrected = {name: _corrected(lake, name, paths) for name, paths in written_files.items() if withdraw and name in CORRECTED}
    files = {
        name: [lake.place(name, path) for path in _without_known(lake, name, paths, set(corrected.get(name, ())))]
        for name, paths in written_files.items()
    }

    def body(connection: Any) -> None:
        delete_records(connection, withdraw)
        for name, ids in corrected.items():
            connection.register("corrected", pa.table({"id": pa.array(ids, pa.string())}))
            connection.execute(f"DELETE FROM {name} WHERE edit_id IN (FROM corrected)")
            for table in TRIPLET_TABLES:
                connection.execute(f"DELETE FROM {table} WHERE subject_id IN (FROM corrected)")
            connection.unregister("corrected")
        register_files(connection, files)

    if withdraw or any(files.values()):
        lake.write(body)


def delete_records(connection: Any, shards: Sequence[tuple[str, str]]) -> None:
    """Take the records of these (source, shard) out of the current state; earlier snapshots keep them."""
    if not shards:
        return
    connection.register("gone", pa.table({"source": [source for source, _ in shards], "shard": [shard for _, shard in shards]}))
    of_gone = "(source, shard) IN (SELECT source, shard FROM gone)"
    for table in schema.RECORD_TABLES:
        connection.execute(f"DELETE FROM {table} WHERE record_id IN (SELECT subject_id FROM op_ingest WHERE {of_gone})")
    for table in ("op_ingest", "provenance", "op_shard"):
        connection.execute(f"DELETE FROM {table} WHERE {of_gone}")
    connection.unregister("gone")


def _corrected(lake: Lake, table: str, paths: Sequence[Path]) -> list[str]:
    """Ids of the triplets of a provider that the workers' files describe otherwise than the lake does."""
    rows = pa.concat_tables([pq.read_table(path) for path in paths])
    differs = " OR ".join(f"r.{name} IS DISTINCT FROM t.{name}" for name in rows.column_names if name not in ("edit_id", "op_version"))
    return lake.query(
        f"SELECT DISTINCT edit_id FROM rows_read r JOIN {table} t USING (edit_id) JOIN edits e USING (edit_id) "
        f"WHERE e.route = 'provider' AND ({differs}) ORDER BY 1",
        rows_read=rows,
    )["edit_id"].to_pylist()


def _without_known(lake: Lake, table: str, paths: Sequence[Path], corrected: set[str]) -> list[Path]:
    """The workers' files without content that is stored already, in the lake or in a file before, but for the rows of triplets that are
    `corrected`. A file of which nothing is left is deleted."""
    if table in schema.CONTENT_KEYS:
        keys = [schema.CONTENT_KEYS[table]]
    elif table in schema.MEASURED_AT_INGEST:
        keys = ["subject_id", "op_version"]
    else:
        return list(paths)
    ids = [pq.read_table(path, columns=keys) for path in paths]
    equal = " AND ".join(f"ids.{column} = {table}.{column}" for column in keys)
    known = lake.query(f"SELECT {', '.join(keys)} FROM {table} SEMI JOIN ids ON {equal}", ids=pa.concat_tables(ids))
    seen = set(_named(known, keys))
    fresh = []
    for path, own in zip(paths, ids, strict=True):
        named = _named(own, keys)
        keep = np.array([name not in seen or name[0] in corrected for name in named])
        seen.update(named)
        if keep.all():
            fresh.append(path)
            continue
        if keep.any():
            rows = pq.read_table(path).filter(pa.array(keep))
            fresh.append(Path(write_table(table, rows, path.parent, path.stem.removeprefix(f"{table}-") + "n")))
        path.unlink(missing_ok=True)
    return fresh


def _named(rows: pa.Table, keys: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(*(rows[key].to_pylist() for key in keys), strict=True))
