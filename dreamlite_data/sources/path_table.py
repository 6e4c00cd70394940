"""Read tables that name their images by path or URL: JSON lines, a JSON list, CSV or Parquet, with the images beside them.
A unit is a range of rows, digested with the content of every image it names, so that a changed image is noticed too."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from dreamlite_data.settings import IngestSettings
from dreamlite_data.sources import mapping as mappings
from dreamlite_data.sources.base import DigestCache, Record, ShardError, Unit
from dreamlite_data.sources.mapped import ImageStore, image_values, is_url, records
from dreamlite_data.sources.mapped_source import PEEKED_ROWS, MappedSource
from dreamlite_data.sources.row_files import SUFFIXES, Row, rows, some_rows
from dreamlite_data.sources.walk import files_below


@dataclasses.dataclass(frozen=True)
class TableReading:
    """`count` rows of a file from row `first` on, which starts at byte `offset`. `downloaded` maps a URL to its file, or to why
    there is none (see ImageStore)."""

    mapping: mappings.Mapping
    image_root: str
    first: int
    offset: int
    count: int
    downloaded: dict[str, str] = dataclasses.field(default_factory=dict)


def nothing_downloaded(urls: list[str]) -> dict[str, str]:
    """The outcomes where nobody downloads."""
    return {}


@dataclasses.dataclass(frozen=True)
class PathTableSource(MappedSource):
    """The table at `path`, or every table below that folder. `outcomes` says where the files of URLs are."""

    image_root: Path | None = None
    rows_per_unit: int = 256
    outcomes: Callable[[list[str]], Mapping[str, str]] = nothing_downloaded

    def files(self) -> Iterator[Path]:
        """The tables, hidden ones apart. In a folder, plain text and JSON that is no list of lines are something else."""
        if self.path.is_file():
            return iter([self.path])
        tables = set(SUFFIXES) - {".txt", ".json"}
        return (file for file in files_below(self.path) if file.suffix.lower() in tables)

    def urls(self) -> Iterator[tuple[str, str | None]]:
        """(URL, expected sha256 or None) of every image that is named by one."""
        for file in self.files():
            try:
                for row in itertools.islice(rows(file), self.limit_rows):
                    for value in self._values(row):
                        if is_url(value):
                            yield value, None
            except ShardError:
                continue  # `units` gives it to quarantine

    def units(self, digests: DigestCache) -> Iterator[Unit]:
        """One unit per `rows_per_unit` rows. Raises MappingError where the first readable table lacks a mapped column."""
        left, checked = self.limit_rows, False
        for file in self.files():
            try:
                first_rows = [row.values for row in itertools.islice(rows(file), PEEKED_ROWS) if row.error is None]
                if first_rows and not checked:
                    mappings.check_rows(self.mapping, first_rows, f"{self.name}/{file.name}")
                    checked = True
                taken = itertools.islice(rows(file), left)
                while part := list(itertools.islice(taken, self.rows_per_unit)):
                    yield self._unit(file, part, digests)
                    left = None if left is None else left - len(part)
            except ShardError:
                yield self._unit(file, [Row(0)], digests)  # reading says again what is wrong, and puts it in quarantine

    def _unit(self, file: Path, part: list[Row], digests: DigestCache) -> Unit:
        root = self.path if self.path.is_dir() else self.path.parent
        image_root = (self.image_root or file.parent).resolve()
        values = [value for row in part for value in self._values(row)]
        downloaded = dict(self.outcomes(sorted({value for value in values if is_url(value)})))
        content = hashlib.sha256()
        for row in part:
            content.update(json.dumps([row.values, row.error], sort_keys=True, default=repr).encode())
        for value in values:
            content.update(self._content(value, image_root, downloaded, digests).encode())
        reading = TableReading(self.mapping, str(image_root), part[0].number, part[0].offset, len(part))
        shard = f"{file.relative_to(root).as_posix()}@{part[0].number}"
        # Neither where a line starts nor where a file was stored makes other records: the digest is that of `content` alone.
        unit = self.unit(shard, str(file), "table", content.hexdigest(), dataclasses.replace(reading, offset=0), file.stat().st_size)
        return dataclasses.replace(unit, reading=dataclasses.replace(reading, downloaded=downloaded))

    def _values(self, row: Row) -> list[object]:
        try:
            return list(image_values(self.mapping, row.values)) if row.error is None else []
        except ValueError:  # nothing to unroll: the row will be a failure
            return []

    @staticmethod
    def _content(value: object, root: Path, downloaded: Mapping[str, str], digests: DigestCache) -> str:
        if is_url(value):
            return downloaded.get(value, "")
        if not isinstance(value, str):
            return repr(value)
        path = root / value
        try:
            return digests.digest(path) if path.resolve().is_relative_to(root) else "outside"
        except (OSError, ValueError):
            return "absent"


def read_table(unit: Unit, limits: IngestSettings) -> list[Record]:
    """The records of one range of rows."""
    reading: TableReading = unit.reading
    images = ImageStore(reading.image_root, limits, reading.downloaded)
    found: list[Record] = []
    for row in some_rows(Path(unit.path), Row(reading.first, offset=reading.offset), reading.count):
        if row.error is not None:
            found.append(Record(key=f"{row.number:08d}", error="bad_row", detail=row.error))
        else:
            found += records(reading.mapping, f"{row.number:08d}", row.values, images)
    return found
