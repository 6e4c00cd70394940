"""Find the rows that an operator has not measured yet, run it over them on an executor, and commit what comes back.
Pending work is a query, so a first build, a nightly refresh and a resume after a crash are the same code."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dreamlite_data import schema
from dreamlite_data.dataset import image_places
from dreamlite_data.executors import Executor
from dreamlite_data.lake import Lake, insert
from dreamlite_data.operators.base import Operator, Task, op_version, run_task
from dreamlite_data.operators.commits import Commits
from dreamlite_data.operators.stages import infer_task, prepare_task
from dreamlite_data.progress import Progress

TASKS_PER_QUERY = 32
"""Inputs of so many tasks are read together: a query per task would scan the subjects once per task."""

ROWS_HELD = 8192
"""About so many rows of a temporary file are held at once, to write it and to read it."""

ROWS_SORTED = 16_384
"""At most so many rows with all their columns are sorted at once."""
ID_HEAD = 4
"""Ids are counted by so many of their first characters, to cut them into ranges: 65,536 counts of ids in hex."""

OFF = "off"
"""The version of an operator that is not used any more: no row has it."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """How an operator is applied: `make` builds it (on the driver and on workers), `subjects` is SQL for its narrow input
    whose first column is the subject, `image_columns` maps input columns of bytes to the id columns that name the image."""

    make: Callable[[], Operator]
    subjects: str
    image_columns: Mapping[str, str] = dataclasses.field(default_factory=dict)


def measure_pending(lake: Lake, measurement: Measurement, executor: Executor, rows_per_task: int) -> dict[str, int]:
    """Run one operator over its pending rows. Returns how many rows it measured and how many of them failed."""
    operator = measurement.make()
    version = op_version(operator)
    measured = failed = 0
    with waiting(lake, measurement, operator.table, version) as subjects:
        if subjects.metadata.num_rows:
            tasks = cut(lake, measurement, subjects, version, rows_per_task)
            with Progress(operator.name, total=subjects.metadata.num_rows, unit="rows") as bar, Commits(lake) as commits:
                if hasattr(operator, "prepare"):
                    results = executor.map_stages(prepare_task, infer_task, tasks, operator.resources)
                else:
                    results = executor.map(run_task, tasks, operator.resources)
                for written in results:
                    commits.add(written)
                    measured += written.rows
                    failed += written.failed
                    bar.advance(written.rows, failed=failed)
    make_current(lake, operator.name, version, operator.config())
    return {"rows": measured, "failed": failed}


@contextlib.contextmanager
def waiting(lake: Lake, measurement: Measurement, table: str, version: str) -> Iterator[pq.ParquetFile]:
    """One column, subject_id, of the pending rows: in the order of their images' files, so that a file is read once, or of their ids.
    It lies in a temporary file, for a night's work may be any number of rows."""
    subject = _subject(lake, measurement.subjects)
    open_rows = _open_rows(measurement.subjects, subject, table)
    main = next(iter(measurement.image_columns.values()), None)
    if main is None:
        rows = f"SELECT {subject} AS subject_id FROM ({open_rows}) ORDER BY 1"
    else:
        rows = (
            f"SELECT s.{subject} AS subject_id FROM ({open_rows}) s LEFT JOIN images ON images.image_id = s.{main} "
            "ORDER BY images.filename, images.file_row_number, 1"
        )
    with tempfile.NamedTemporaryFile(dir=lake.staging, suffix=".parquet") as file:
        _copy(lake, rows, file.name, {"version": version})
        with pq.ParquetFile(file.name) as subjects:
            yield subjects


@contextlib.contextmanager
def pending_files(lake: Lake, subjects: str, table: str, version: str) -> Iterator[list[str]]:
    """Paths of temporary Parquet files that hold, one after the other, what `pending` answers, for rows that are too many to hold. Each
    is of one range of ids: one sort of all would hold them, at three times their size."""
    subject = _subject(lake, subjects)
    with tempfile.TemporaryDirectory(dir=lake.staging) as folder:
        paths = []
        for low, high in _id_ranges(lake, subjects, subject, table, version):
            paths.append(f"{folder}/{len(paths)}.parquet")
            rows = _open_rows(subjects, subject, table, "{} >= $low AND ($high IS NULL OR {} < $high)")
            _copy(lake, f"{rows} ORDER BY s.{subject}", paths[-1], {"version": version, "low": low, "high": high})
            if not pq.read_metadata(paths[-1]).num_rows:
                paths.pop()
        yield paths


def _id_ranges(lake: Lake, subjects: str, subject: str, table: str, version: str) -> Iterator[tuple[str, str | None]]:
    """(lowest id, lowest id of the next or None) of ranges that hold all ids, in ascending order, each with at most ROWS_SORTED pending
    rows if ids tell them apart. Counted as rows less those that are done, for to ask which are would hold the ids of all."""
    heads = lake.query(
        f"SELECT head, sum(n)::BIGINT AS n FROM (SELECT left({subject}, {ID_HEAD}) AS head, count(*) AS n FROM ({subjects}) GROUP BY 1 UNION ALL "
        f"SELECT left(subject_id, {ID_HEAD}), -count(*) FROM {table} WHERE op_version = $version GROUP BY 1) GROUP BY 1 HAVING sum(n) > 0 ORDER BY 1",
        {"version": version},
    )
    lows, filled = [""], 0
    for head, count in zip(heads["head"].to_pylist(), heads["n"].to_pylist(), strict=True):
        if filled and filled + count > ROWS_SORTED:
            lows.append(head)
            filled = 0
        filled += count
    return itertools.pairwise([*lows, None])


def _copy(lake: Lake, sql: str, path: str, parameters: Mapping[str, Any]) -> None:
    place = path.replace("'", "''")
    lake.query(f"COPY ({sql}) TO '{place}' (FORMAT parquet, ROW_GROUP_SIZE {ROWS_HELD})", parameters)


def pending(lake: Lake, subjects: str, table: str, version: str) -> pa.Table:
    """The rows of `subjects` that have no row of this version in `table`."""
    subject = _subject(lake, subjects)
    return lake.query(f"{_open_rows(subjects, subject, table)} ORDER BY s.{subject}", {"version": version})


def _subject(lake: Lake, subjects: str) -> str:
    """Name of the column that names the subject: the first."""
    return lake.query(f"DESCRIBE SELECT * FROM ({subjects})")["column_name"][0].as_py()


def _open_rows(subjects: str, subject: str, table: str, within: str = "true") -> str:
    """SQL for the rows `s` of `subjects` that have no row of $version in `table`. `within` is a condition on ids, {} for the id: said of
    both sides, for DuckDB would hold all that is done and not what is done of these."""
    some = f"SELECT * FROM ({subjects}) WHERE {within.replace('{}', subject)}"
    done = f"SELECT subject_id FROM {table} WHERE op_version = $version AND {within.replace('{}', 'subject_id')}"
    return f"SELECT s.* FROM ({some}) s ANTI JOIN ({done}) d ON d.subject_id = s.{subject}"


def cut(lake: Lake, measurement: Measurement, subjects: pq.ParquetFile, version: str, rows_per_task: int) -> Iterator[Task]:
    """Tasks of at most `rows_per_task` of the `subjects` in their order, each read from the lake when it is asked for.
    Raises LookupError where an image is referred to but not stored."""
    first = _subject(lake, measurement.subjects)
    for batch in subjects.iter_batches(rows_per_task * TASKS_PER_QUERY):
        portion = pa.Table.from_batches([batch])
        portion = portion.append_column("at", pa.array(np.arange(len(portion))))
        rows = lake.query(
            f"SELECT s.* FROM ({measurement.subjects}) s JOIN portion ON portion.subject_id = s.{first} ORDER BY portion.at", portion=portion
        )
        places = _places(lake, measurement, rows)
        for begin in range(0, len(rows), rows_per_task):
            part = rows.slice(begin, rows_per_task).combine_chunks()
            needed = {image_id for column in measurement.image_columns.values() for image_id in part[column].to_pylist()}
            yield Task(
                measurement.make, version, part, dict(measurement.image_columns), {image_id: places[image_id] for image_id in needed},
                str(lake.staging),
            )  # fmt: skip


def _places(lake: Lake, measurement: Measurement, rows: pa.Table) -> dict[str, tuple[str, int]]:
    """{image id: (file, row)} of every image that `rows` refer to."""
    if not measurement.image_columns:
        return {}
    ids = pc.unique(pa.chunked_array([chunk for column in measurement.image_columns.values() for chunk in rows[column].chunks]))
    places = image_places(lake, ids)
    lost = [image_id for image_id in ids.to_pylist() if image_id not in places]
    if lost:
        raise LookupError(f"{len(lost)} images are referred to but not stored, the first is {lost[0]}")
    return places


def withdraw_passing_failures(lake: Lake, table: str, version: str, followed_by: tuple[str, ...] = ()) -> None:
    """Make calls pending again that failed for a passing reason (`retry` in `table`); the cache of responses counts how often. What
    stands in the tables `followed_by` about the same subjects was found without those answers, and is pending again too."""
    passing, given = f"FROM {table} WHERE op_version = $version AND retry", {"version": version}

    def body(connection: Any) -> None:
        for later in followed_by:
            connection.execute(f"DELETE FROM {later} WHERE subject_id IN (SELECT subject_id {passing})", given)
        connection.execute(f"DELETE {passing}", given)

    if lake.query(f"SELECT count(*) AS n {passing}", given)["n"][0].as_py():
        lake.write(body)


def passing_failures(lake: Lake, tables: Iterable[str]) -> int:
    """How many calls in these tables failed for a passing reason, and are made again, of the operators that are in use."""
    counts = " UNION ALL ".join(f"SELECT count(*) AS n FROM {table} SEMI JOIN current_versions USING (op_version) WHERE retry" for table in tables)
    return int(lake.query(f"SELECT sum(n)::BIGINT AS n FROM ({counts})")["n"][0].as_py()) if counts else 0


def switch_off(lake: Lake, unused: Callable[[str], bool]) -> None:
    """Take the rows of the operators whose name is `unused` out of the views. They come back without work when they are used again."""
    names = lake.query("SELECT name FROM current_versions WHERE op_version <> $off ORDER BY name", {"off": OFF})["name"].to_pylist()
    for name in filter(unused, names):
        make_current(lake, name, OFF, {})


def make_current(lake: Lake, name: str, version: str, config: dict[str, Any]) -> None:
    """Let the views follow this version of the operator; nothing is written where they do already."""
    rows = lake.query(
        "SELECT max(position) AS top, arg_max(op_version, position) AS version FROM operator_versions WHERE name = $name", {"name": name}
    ).to_pylist()[0]
    if rows["version"] == version:
        return
    row = {
        "name": name, "op_version": version, "config_json": json.dumps(config, sort_keys=True, default=str)[:2000],
        "position": 0 if rows["top"] is None else rows["top"] + 1,
    }  # fmt: skip
    lake.write(lambda connection: insert(connection, {"operator_versions": schema.rows_table("operator_versions", [row])}))
