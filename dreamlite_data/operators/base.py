"""The contract of an operator, and the one task that runs any of them on a worker.
An operator measures: it takes a table, gives back one row per input row, and a bad row becomes a row with `error` set."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dreamlite_data import schema

ROW_GROUP_BYTES = 16 * 2**20
PAGE_ROWS = 16  # of images: a page of a megabyte is copied within the cache, one of a whole row group is not


class Operator(Protocol):
    """`name` and `version` identify the code, `reads` the input columns, `schema` what `__call__` returns.
    `table` is where its rows go and `resources` what one worker needs (num_cpus, num_gpus)."""

    name: str
    version: int
    reads: tuple[str, ...]
    schema: pa.Schema
    table: str
    resources: dict[str, float]

    def config(self) -> dict[str, Any]: ...

    def __call__(self, rows: pa.Table) -> pa.Table: ...


def op_version(operator: Operator) -> str:
    """Key of an operator's rows: its name, version, and the digest of everything that can change what it writes."""
    config = json.dumps(operator.config(), sort_keys=True, default=str)
    return f"{operator.name}-{operator.version}-{hashlib.sha256(config.encode()).hexdigest()[:12]}"


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard of an operator's work. `make` builds the operator on the worker; `rows` are its narrow inputs;
    `image_columns` maps an input column to the id column that names its image, `places` an image id to (file, row)."""

    make: Callable[[], Operator]
    version: str
    rows: pa.Table
    image_columns: Mapping[str, str]
    places: Mapping[str, tuple[str, int]]
    staging: str


@dataclasses.dataclass(frozen=True)
class Written:
    """What a worker wrote: per table the file, and how many rows failed of how many."""

    files: Mapping[str, str]
    rows: int
    failed: int


def run_task(task: Task) -> Written:
    """Runs on a worker: fetch the images, call the operator, write its rows to a Parquet file in the staging directory."""
    operator = task.make()
    rows = inputs_of(task, operator)
    return written(task, operator, rows, operator(rows))


def inputs_of(task: Task, operator: Operator) -> pa.Table:
    """The rows of a task with the bytes of their images. Raises KeyError where a column is missing that the operator reads."""
    rows = task.rows
    for column, id_column in task.image_columns.items():
        payloads = fetch(task.places, rows[id_column].to_pylist())
        rows = rows.append_column(column, pa.array(payloads, pa.binary()))
    missing = [name for name in operator.reads if name not in rows.column_names]
    if missing:
        raise KeyError(f"operator {operator.name} reads {', '.join(missing)}, which its input lacks")
    return rows


def written(task: Task, operator: Operator, rows: pa.Table, answer: pa.Table) -> Written:
    """Write the answer to `rows`, and what else the operator has to say, to Parquet files in the staging directory."""
    if len(answer) != len(rows):
        raise RuntimeError(f"operator {operator.name} gave {len(answer)} rows for {len(rows)}: it may not drop or add rows")
    tables = {operator.table: stamp(operator.table, answer, task.version)}
    extra = getattr(operator, "side_tables", None)
    if extra is not None:
        tables |= {name: stamp(name, table, task.version) for name, table in extra(rows, answer).items() if len(table)}
    key = hashlib.sha256((task.version + "".join(answer["subject_id"].to_pylist())).encode()).hexdigest()[:24]
    failed = len(answer) - answer["error"].null_count
    return Written({name: write_table(name, table, Path(task.staging), key) for name, table in tables.items()}, len(answer), failed)


def stamp(table: str, rows: pa.Table, version: str) -> pa.Table:
    """`rows` with the op_version column set, in the table's own schema."""
    if "op_version" in schema.TABLES[table].names:
        if "op_version" in rows.column_names:
            rows = rows.drop_columns(["op_version"])
        rows = rows.append_column("op_version", pa.array([version] * len(rows), pa.string()))
    return schema.conform(table, rows)


def fetch(places: Mapping[str, tuple[str, int]], ids: list[str]) -> list[bytes]:
    """Image bytes for `ids`, reading each file's row groups at most once. An unknown id raises KeyError."""
    wanted: dict[str, dict[int, str]] = {}
    for image_id in ids:
        file, row = places[image_id]
        wanted.setdefault(file, {})[row] = image_id
    found: dict[str, bytes] = {}
    for file, rows in wanted.items():
        reader = pq.ParquetFile(file)
        start = 0
        for group in range(reader.num_row_groups):
            stop = start + reader.metadata.row_group(group).num_rows
            inside = sorted(row for row in rows if start <= row < stop)
            if inside:
                column = reader.read_row_group(group, columns=["bytes"])["bytes"]
                taken = pc.take(column, pa.array([row - start for row in inside])).to_pylist()
                found |= {rows[row]: payload for row, payload in zip(inside, taken, strict=True)}
            start = stop
    return [found[image_id] for image_id in ids]


def write_table(table: str, rows: pa.Table, staging: Path, key: str) -> str:
    """Write one Parquet file for `table`. Image bytes lie uncompressed, without dictionary or statistics, in row groups
    of about 16 MB: they do not compress, and a reader of the narrow columns then never touches them."""
    staging.mkdir(parents=True, exist_ok=True)
    path = staging / f"{table}-{key}.parquet"
    draft = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.tmp")  # of this task alone: one that was given up may still write the same file
    if table == "images":
        narrow = [name for name in rows.column_names if name != "bytes"]
        mean_bytes = max(1, rows["bytes"].nbytes // max(1, len(rows)))
        pq.write_table(
            rows, draft, compression="none", use_dictionary=False, write_statistics=narrow,
            row_group_size=int(np.clip(ROW_GROUP_BYTES // mean_bytes, 16, 16384)), write_batch_size=PAGE_ROWS,
        )  # fmt: skip
    else:
        pq.write_table(rows, draft, compression="zstd")
    draft.replace(path)
    return str(path)


def by_row(function: Callable[[dict[str, Any]], dict[str, Any]], rows: pa.Table, subject: str, table_schema: pa.Schema) -> pa.Table:
    """Apply `function` to each row; whatever it raises becomes that row's error."""
    answers = [{"subject_id": row[subject], **answered(function, row)} for row in rows.to_pylist()]
    return pa.Table.from_pylist(answers, schema=table_schema)


def answered(function: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """What `function` answers, or its exception as an error."""
    try:
        return function(*given)
    except Exception as error:  # the contract: a bad row is a result
        return {"error": f"{type(error).__name__}: {error}"[:500]}
