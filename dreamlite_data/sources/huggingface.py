"""Read Hugging Face datasets through `datasets`: a hub id, a folder that save_to_disk wrote, or a folder that load_dataset understands.
Parquet behind either is read file by file; other formats are streamed in ranges of rows. Images stay encoded bytes throughout."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dreamlite_data.settings import IngestSettings
from dreamlite_data.sources import mapping as mappings
from dreamlite_data.sources.base import DigestCache, Record, ShardError, Unit
from dreamlite_data.sources.mapped import ImageStore, records
from dreamlite_data.sources.mapped_source import MappedSource
from dreamlite_data.sources.parquet import ParquetReading, ParquetSource, rows_to_records

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class DatasetUnavailable(ValueError):
    """The dataset, configuration or split is not there; the message says what there is, and how to mend."""


@dataclasses.dataclass(frozen=True)
class SavedReading:
    """`count` rows from `first` on of one Arrow file that save_to_disk wrote."""

    mapping: mappings.Mapping
    image_root: str
    first: int
    count: int


@dataclasses.dataclass(frozen=True)
class StreamReading:
    """`count` rows from `first` on of a streamed dataset."""

    mapping: mappings.Mapping
    config: str | None
    split: str
    revision: str | None
    first: int
    count: int
    image_root: str | None


@dataclasses.dataclass(frozen=True)
class HuggingFaceSource(MappedSource):
    """One split of a dataset. `path` is a local folder or a hub id."""

    config: str | None = None
    split: str = "train"
    revision: str | None = None
    image_root: Path | None = None
    rows_per_unit: int = 256
    unit_mb: int = 256

    def units(self, digests: DigestCache) -> Iterator[Unit]:
        """Units whose digest holds what they read: the content of a local file; of a hub file its name and commit; of a range of rows
        the dataset, configuration, split, commit and range. Raises DatasetUnavailable or MappingError."""
        if self.path.is_dir() and any((self.path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            yield from self._saved_units(digests)
            return
        builder = self._builder()
        files = [str(file) for file in self._data_files(builder)]
        if files and all(file.endswith(".parquet") for file in files):
            yield from self._parquet_units(files, digests)
        else:
            yield from self._stream_units(builder, files, digests)

    def _saved_units(self, digests: DigestCache) -> Iterator[Unit]:
        folder = self.path
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_bytes()).get("splits", [])
            if self.split not in splits:
                raise DatasetUnavailable(f"source {self.name!r}: {folder} has no split {self.split!r}, it has {', '.join(splits)}")
            folder = folder / self.split
        left = self.limit_rows
        for item in json.loads((folder / "state.json").read_bytes())["_data_files"]:
            file = folder / Path(item["filename"]).name
            try:
                table = arrow_table(file)
            except ShardError:
                table = None  # its unit is quarantined when it is read
            if table is not None:
                mappings.check_schema(self.mapping, table.schema, f"{self.name}/{file.name}")
            total = 1 if table is None else len(table) if left is None else min(left, len(table))
            for first in range(0, total, self.rows_per_unit):
                root = str(self.image_root or self.path)
                reading = SavedReading(self.mapping, root, first, min(self.rows_per_unit, total - first))
                yield self.unit(f"{file.relative_to(self.path).as_posix()}@{first}", str(file), "saved", digests.digest(file), reading)
            left = None if left is None else left - total

    def _parquet_units(self, files: list[str], digests: DigestCache) -> Iterator[Unit]:
        if not files[0].startswith("hf://"):
            left = self.limit_rows
            for file in files:
                source = ParquetSource(
                    self.name, Path(file), self.mapping, self.domain, self.licence, self.origin, left, self.image_root or self.path, self.unit_mb
                )
                for unit in source.units(digests):
                    yield dataclasses.replace(unit, shard=unit.shard.replace(Path(file).name, _below(file, self.path), 1))
                if left is not None:
                    left -= _rows_in(file)
                    if left <= 0:
                        return
            return
        left = self.limit_rows
        for index, file in enumerate(files):
            last = None
            if index == 0 or left is not None:
                names, total = footer(file)
                if index == 0:
                    mappings.check_schema(self.mapping, names, f"{self.name} ({self.path})")
                last = left if left is not None and left < total else None
                left = None if left is None else left - total
            address = re.sub(r"^hf://datasets/[^@]+@[^/]+/", "", file)
            yield self.unit(address, file, "parquet", file, ParquetReading(self.mapping, None, stop_row=last))
            if left is not None and left <= 0:
                return

    def _stream_units(self, builder: Any, files: list[str], digests: DigestCache) -> Iterator[Unit]:
        local = self.path.is_dir()
        if local:
            content = hashlib.sha256("".join(digests.digest(Path(file)) for file in files).encode()).hexdigest()
        else:
            content = json.dumps([str(self.path), self.config, self.split, commit_of(files) or self.revision or builder.hash])
        known = builder.info.splits[self.split].num_examples if builder.info.splits and self.split in builder.info.splits else None
        total = known or self.limit_rows
        if total is None and local:
            total = sum(1 for _ in self._open())
        if total is None:
            raise DatasetUnavailable(f"source {self.name!r}: {self.path} does not say how many rows it has: set limit_rows")
        total = min(total, self.limit_rows or total)
        first_row = next(iter(self._open()), None)
        if first_row is not None:
            mappings.check_rows(self.mapping, [first_row], f"{self.name} ({self.path})")
        for first in range(0, total, self.rows_per_unit):
            reading = StreamReading(
                self.mapping, self.config, self.split, self.revision, first, min(self.rows_per_unit, total - first),
                str((self.image_root or self.path).resolve()) if local else None,
            )  # fmt: skip
            yield self.unit(f"{self.split}@{first}", str(self.path), "stream", content, reading)

    def _builder(self) -> Any:
        import datasets

        if not self.path.exists() and not HUB_ID.fullmatch(str(self.path)):
            raise DatasetUnavailable(f"source {self.name!r}: {self.path} is neither a folder that is there nor a hub id (owner/name)")
        try:
            return datasets.load_dataset_builder(str(self.path), name=self.config, revision=self.revision)
        except Exception as error:  # `datasets` raises kinds of many libraries: the hub's, the builder's, the network's
            detail = " ".join(str(error).split())[:300]
            raise DatasetUnavailable(
                f"source {self.name!r}: {self.path} cannot be opened as a dataset ({type(error).__name__}: {detail}): correct path, config "
                "or revision, and for the hub check the network and HF_TOKEN; downloads are off unless HF_HUB_OFFLINE=0 is set"
            ) from error

    def _data_files(self, builder: Any) -> list[Any]:
        found = builder.config.data_files or {}
        if self.split not in found:
            raise DatasetUnavailable(f"source {self.name!r}: {self.path} has no split {self.split!r}, it has {', '.join(map(str, found)) or 'none'}")
        return list(found[self.split])

    def _open(self) -> Any:
        return open_stream(str(self.path), self.config, self.split, self.revision)


def _below(file: str, root: Path) -> str:
    path = Path(file).resolve()
    return path.relative_to(root.resolve()).as_posix() if path.is_relative_to(root.resolve()) else path.name


def _rows_in(file: str) -> int:
    try:
        return pq.read_metadata(file).num_rows
    except (pa.ArrowException, OSError):
        return 0


def commit_of(files: list[str]) -> str | None:
    """The commit that hub files were resolved at: it stands in their address (hf://datasets/owner/name@commit/...)."""
    found = re.match(r"hf://datasets/[^@]+@([^/]+)/", files[0]) if files else None
    return found.group(1) if found else None


def footer(file: str) -> tuple[pa.Schema, int]:
    """Columns and number of rows of a Parquet file on the hub, from its footer alone. Raises DatasetUnavailable."""
    import fsspec

    try:
        with fsspec.open(file, "rb") as handle, pq.ParquetFile(handle) as reader:
            return reader.schema_arrow, reader.metadata.num_rows
    except Exception as error:  # the hub's client and the network raise kinds of their own
        raise DatasetUnavailable(f"{file} cannot be opened ({type(error).__name__}: {error}): check the network and HF_TOKEN") from error


def open_stream(path: str, config: str | None, split: str, revision: str | None) -> Any:
    """The split as a stream of rows in which an image is {bytes, path} as it lies in the file."""
    import datasets

    return datasets.load_dataset(path, name=config, split=split, revision=revision, streaming=True).decode(False)


def arrow_table(file: Path) -> pa.Table:
    """An Arrow file of save_to_disk, mapped into memory and not read. Raises ShardError."""
    try:
        with pa.memory_map(str(file)) as source:
            return pa.ipc.open_stream(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"not a readable Arrow file: {error}") from None


def read_saved(unit: Unit, limits: IngestSettings) -> list[Record]:
    """The records of a range of rows of one Arrow file."""
    reading: SavedReading = unit.reading
    table = arrow_table(Path(unit.path))
    part = table.select(mappings.needed(reading.mapping, table.schema.names)).slice(reading.first, reading.count)
    return rows_to_records(reading.mapping, part, reading.first, ImageStore(reading.image_root, limits))


def read_stream(unit: Unit, limits: IngestSettings) -> list[Record]:
    """The records of a range of rows of a streamed dataset. Skipping to a range passes over the rows before it."""
    reading: StreamReading = unit.reading
    images = ImageStore(reading.image_root, limits)
    found: list[Record] = []
    try:
        stream = open_stream(unit.path, reading.config, reading.split, reading.revision)
        for number, row in enumerate(stream.skip(reading.first).take(reading.count), start=reading.first):
            row = row if reading.image_root else {name: _fetch(value, unit.path) for name, value in row.items()}
            found += records(reading.mapping, f"{number:08d}", row, images)
    except Exception as error:  # whatever a builder or the network raises costs this range, not the night
        raise ShardError(f"rows {reading.first} to {reading.first + reading.count} cannot be streamed: {type(error).__name__}: {error}") from None
    return found


def _fetch(value: Any, dataset: str) -> Any:
    """An image that the stream only names by its address in this very dataset, as bytes."""
    if isinstance(value, dict) and value.get("bytes") is None and f"hf://datasets/{dataset}@" in str(value.get("path")):
        import fsspec

        with fsspec.open(value["path"], "rb") as handle:
            return {**value, "bytes": handle.read()}
    return value
