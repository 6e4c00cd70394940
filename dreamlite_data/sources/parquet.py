"""Read Parquet files that hold image bytes: a file is a unit, and one too large for memory several units of whole row groups.
What the columns mean says a mapping; without one, the usual names of an image and its caption are tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from dreamlite_data.settings import IngestSettings
from dreamlite_data.sources import mapping as mappings
from dreamlite_data.sources.base import DigestCache, Record, ShardError, Unit
from dreamlite_data.sources.mapped import ImageStore, records
from dreamlite_data.sources.mapped_source import MappedSource
from dreamlite_data.sources.walk import files_below

DEFAULT_MAPPING = "image_text"
LARGE_GROUP_MB = 100
"""Row groups above this make random access and flat memory impossible; the Hugging Face viewer refuses them at 286 MiB."""
SLICE_ROWS = 32


@dataclasses.dataclass(frozen=True)
class ParquetReading:
    """Row groups `first_group` to `stop_group` (None: to the last) of a file, no row at or after `stop_row`."""

    mapping: mappings.Mapping
    image_root: str | None
    first_group: int = 0
    stop_group: int | None = None
    stop_row: int | None = None


@dataclasses.dataclass(frozen=True)
class ParquetSource(MappedSource):
    """Every `*.parquet` below the folder `path` in name order, or that one file."""

    image_root: Path | None = None
    unit_mb: int = 256

    def files(self) -> Iterator[Path]:
        """The files, hidden ones apart."""
        if self.path.is_file():
            return iter([self.path])
        return (file for file in files_below(self.path) if file.suffix == ".parquet")

    def holds_paths(self) -> bool:
        """Whether the first readable file names its images by path or URL instead of holding their bytes."""
        for file in self.files():
            try:
                schema = pq.read_schema(file)
            except (pa.ArrowException, OSError):
                continue
            names = {mappings.top_level(name) for column in self.mapping.images.values() for name in column}
            kinds = [_innermost(schema.field(name).type) for name in (*names, self.mapping.unroll) if name in schema.names]
            return bool(kinds) and all(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in kinds)
        return False

    def units(self, digests: DigestCache) -> Iterator[Unit]:
        """One unit per file, more for a large one. Raises MappingError where the first readable file lacks a mapped column."""
        root = self.path if self.path.is_dir() else self.path.parent
        left, checked = self.limit_rows, False
        for file in self.files():
            if left is not None and left <= 0:
                return
            try:
                with pq.ParquetFile(file) as reader:
                    facts, schema = reader.metadata, reader.schema_arrow
            except (pa.ArrowException, OSError):
                facts = None  # reading will say what is wrong with it and put it in quarantine
            if facts is not None and not checked:
                mappings.check_schema(self.mapping, schema, f"{self.name}/{file.name}")
                checked = True
            last = left if facts is not None and left is not None and left < facts.num_rows else None
            for first, stop in cut(facts, self.unit_mb) if facts else [(0, None)]:
                shard = file.relative_to(root).as_posix()
                reading = ParquetReading(self.mapping, str(self.image_root or root), first, stop, last)
                whole = stop is None and first == 0
                yield self.unit(
                    shard if whole else f"{shard}@{first}", str(file), "parquet", digests.digest(file), reading, file.stat().st_size
                )
            if left is not None and facts is not None:
                left -= facts.num_rows



def _innermost(kind: pa.DataType) -> pa.DataType:
    """What a list holds; of a struct that is no image ({bytes, path}), what its first field holds."""
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") < 0):
        kind = kind.value_type if not pa.types.is_struct(kind) else kind.field(0).type
    return kind


def cut(facts: pq.FileMetaData, unit_mb: int) -> list[tuple[int, int | None]]:
    """(first, stop) row groups of each unit of a file; (0, None) where the file is one unit."""
    sizes = [facts.row_group(index).total_byte_size for index in range(facts.num_row_groups)]
    if sum(sizes) <= unit_mb * 2**20 or len(sizes) == 1:
        return [(0, None)]
    bounds, filled = [0], 0
    for index, size in enumerate(sizes):
        if filled and filled + size > unit_mb * 2**20:
            bounds.append(index)
            filled = 0
        filled += size
    return list(zip(bounds, [*bounds[1:], len(sizes)], strict=True))


def read_parquet(unit: Unit, limits: IngestSettings) -> list[Record]:
    """The records of one unit, in row order. Row groups are read one at a time, and of each only the mapped columns."""
    reading: ParquetReading = unit.reading
    images = ImageStore(reading.image_root, limits)
    found: list[Record] = []
    try:
        with fsspec.open(unit.path, "rb") as handle, pq.ParquetFile(handle) as reader:
            mappings.check_schema(reading.mapping, reader.schema_arrow, unit.shard)
            columns = mappings.needed(reading.mapping, reader.schema_arrow.names)
            facts = reader.metadata
            number = sum(facts.row_group(index).num_rows for index in range(reading.first_group))
            stop_group = facts.num_row_groups if reading.stop_group is None else reading.stop_group
            for group in range(reading.first_group, stop_group):
                if reading.stop_row is not None and number >= reading.stop_row:
                    break
                table = reader.read_row_group(group, columns=columns)
                stop = len(table) if reading.stop_row is None else min(len(table), reading.stop_row - number)
                found += rows_to_records(reading.mapping, table.slice(0, stop), number, images)
                number += len(table)
            _note_large_groups(facts, range(reading.first_group, stop_group), found)
    except mappings.MappingError as error:
        raise ShardError(str(error)) from None
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"not a readable Parquet file: {error}") from None
    return found


def rows_to_records(mapping: mappings.Mapping, table: pa.Table, number: int, images: ImageStore) -> list[Record]:
    """The records of `table`, whose first row has number `number`. Text that is no UTF-8 costs its row, not its file."""
    found: list[Record] = []
    for start in range(0, len(table), SLICE_ROWS):
        part = table.slice(start, SLICE_ROWS)
        for index, row in enumerate(_rows(part), start=number + start):
            if isinstance(row, str):
                found.append(Record(key=f"{index:08d}", error="bad_row", detail=row))
            else:
                found += records(mapping, f"{index:08d}", row, images)
    return found


def _rows(table: pa.Table) -> list[dict[str, Any] | str]:
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        return [_one_row(table, index) for index in range(len(table))]


def _one_row(table: pa.Table, index: int) -> dict[str, Any] | str:
    row = {}
    for name in table.column_names:
        try:
            row[name] = table[name][index].as_py()
        except UnicodeDecodeError as error:
            return f"column {name!r} is not UTF-8: {error}"
    return row


def _note_large_groups(facts: pq.FileMetaData, groups: range, found: list[Record]) -> None:
    largest = max((facts.row_group(group).total_byte_size for group in groups), default=0)
    if largest > LARGE_GROUP_MB * 2**20 and found:
        found[0].notes.append(f"large_row_group {largest / 2**20:.0f} MB: rewrite the file with row groups below {LARGE_GROUP_MB} MB")
