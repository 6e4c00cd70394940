"""Read the rows of a table file: text (a URL a line), CSV, TSV, JSON lines, a JSON list, or Parquet, by its suffix.
A line that cannot be read is a row with its reason; a file that cannot is a ShardError."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dreamlite_data.sources.base import ShardError

SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
LINE_SUFFIXES = (".jsonl", ".ndjson")
MAX_LINE_BYTES = 16 * 2**20
BATCH_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Row:
    """Row `number` (from 0) of a file; `offset` is the byte where its line starts, in files of JSON lines. `error` says why there are
    no values."""

    number: int
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str | None = None
    offset: int = 0


def rows(path: Path) -> Iterator[Row]:
    """Every row of the file in its order. Raises ShardError where the file itself cannot be read."""
    suffix = path.suffix.lower()
    try:
        if suffix in LINE_SUFFIXES:
            yield from _json_lines(path, 0, 0)
        elif suffix == ".json":
            yield from _json_list(path)
        elif suffix == ".parquet":
            yield from _parquet(path)
        elif suffix in (".csv", ".tsv"):
            yield from _separated(path, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".txt":
            yield from _text_lines(path)
        else:
            raise ShardError(f"{path.name} has no known suffix: the reader knows {', '.join(SUFFIXES)}")
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise ShardError(f"{path.name} cannot be read: {error}") from None


def some_rows(path: Path, first: Row, count: int) -> Iterator[Row]:
    """`count` rows from `first` on. A file of JSON lines is entered at its offset; any other is read whole, once per process."""
    if path.suffix.lower() in LINE_SUFFIXES:
        try:
            yield from itertools.islice(_json_lines(path, first.offset, first.number), count)
        except OSError as error:
            raise ShardError(f"{path.name} cannot be read: {error}") from None
        return
    facts = path.stat()
    yield from _all_rows(path, facts.st_size, facts.st_mtime_ns)[first.number : first.number + count]


@functools.lru_cache(maxsize=1)
def _all_rows(path: Path, size: int, changed: int) -> list[Row]:
    return list(rows(path))


def _json_lines(path: Path, offset: int, number: int) -> Iterator[Row]:
    with path.open("rb") as handle:
        handle.seek(offset)
        while line := handle.readline(MAX_LINE_BYTES):
            if line.strip():
                yield _json_row(number, offset, line)
                number += 1
            offset += len(line)


def _json_row(number: int, offset: int, line: bytes) -> Row:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        return Row(number, error=f"line is not JSON: {error}", offset=offset)
    if not isinstance(values, dict):
        return Row(number, error=f"line is a JSON {type(values).__name__}, not an object", offset=offset)
    return Row(number, values, offset=offset)


def _json_list(path: Path) -> Iterator[Row]:
    try:
        items = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(items, list):
        raise ShardError(f"{path.name} is a JSON {type(items).__name__}, not a list of objects")
    for number, values in enumerate(items):
        if isinstance(values, dict):
            yield Row(number, values)
        else:
            yield Row(number, error=f"item is a JSON {type(values).__name__}, not an object")


def _parquet(path: Path) -> Iterator[Row]:
    number = 0
    with pq.ParquetFile(path) as reader:
        for batch in reader.iter_batches(BATCH_ROWS):
            for values in batch.to_pylist():
                yield Row(number, values)
                number += 1


def _separated(path: Path, delimiter: str) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as handle:
        for number, values in enumerate(csv.DictReader(handle, delimiter=delimiter)):
            values.pop(None, None)  # more fields than the header names
            yield Row(number, values)


def _text_lines(path: Path) -> Iterator[Row]:
    lines = io.TextIOWrapper(path.open("rb"), encoding="utf-8-sig", errors="backslashreplace")
    with lines:
        wanted = (line.strip() for line in lines)
        for number, line in enumerate(line for line in wanted if line and not line.startswith("#")):
            yield Row(number, {"url": line})
