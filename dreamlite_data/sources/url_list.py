"""Read a list of URLs (text, CSV, TSV, JSON lines or Parquet with a `url`, and perhaps a `caption` and `sha256`) once they are fetched.
A unit is one URL, so that a file that comes late costs nobody else a second reading."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from dreamlite_data.settings import IngestSettings
from dreamlite_data.sources import mapping as mappings
from dreamlite_data.sources.base import DigestCache, Record, ShardError, Unit, finish
from dreamlite_data.sources.mapped import ImageStore, ImageUnavailable
from dreamlite_data.sources.path_table import nothing_downloaded
from dreamlite_data.sources.row_files import Row, rows

URL_COLUMNS = ("url", "image_url", "URL")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "alt")
LICENCE_COLUMNS = ("licence", "license")
PORTION_ROWS = 16_384
"""Rows whose outcomes are asked for together."""


@dataclasses.dataclass(frozen=True)
class UrlReading:
    """One row of the list, and the file that its URL led to or why there is none (see ImageStore). `problem` is what is wrong with
    the row itself."""

    url: str
    caption: str | None
    licence: str | None
    found: str
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class UrlListSource:
    """The list at `path`, or every list below that folder. `outcomes` says where the files of URLs are."""

    name: str
    path: Path
    domain: str = "other"
    licence: str | None = None
    origin: str | None = None
    limit_rows: int | None = None
    outcomes: Callable[[list[str]], Mapping[str, str]] = nothing_downloaded

    def urls(self) -> Iterator[tuple[str, str | None]]:
        """(URL, expected sha256 or None) of every row. Raises MappingError where the list has no column of URLs."""
        for row in self._rows():
            url = _first(row, URL_COLUMNS)
            if url is not None:
                yield url, _first(row, ("sha256",))

    def units(self, digests: DigestCache) -> Iterator[Unit]:
        """One unit per row, named by its URL; a second row with the same URL gets a number."""
        with contextlib.closing(sqlite3.connect("")) as counts:  # a temporary file: URLs are not held in memory
            counts.execute("CREATE TABLE counts (shard TEXT PRIMARY KEY, times INTEGER) WITHOUT ROWID")
            listed = self._rows()
            while portion := list(itertools.islice(listed, PORTION_ROWS)):
                outcomes = self.outcomes(sorted({url for row in portion if (url := _first(row, URL_COLUMNS)) is not None}))
                for row in portion:
                    yield self._unit(row, outcomes, counts)

    def _unit(self, row: Row, outcomes: Mapping[str, str], counts: sqlite3.Connection) -> Unit:
        url = _first(row, URL_COLUMNS)
        shard = url if url is not None else f"row {row.number}"
        (times,) = counts.execute(
            "INSERT INTO counts VALUES (?, 1) ON CONFLICT DO UPDATE SET times = times + 1 RETURNING times", (shard,)
        ).fetchone()
        reading = UrlReading(
            url or "", _first(row, CAPTION_COLUMNS), _first(row, LICENCE_COLUMNS), outcomes.get(url or "", ""),
            None if url is not None else row.error or "the row has no URL",
        )  # fmt: skip
        text = json.dumps(dataclasses.astuple(dataclasses.replace(reading, found=_content(reading.found))))
        return Unit(
            source=self.name, domain=self.domain, shard=shard if times == 1 else f"{shard}#{times}", path=str(self.path),
            digest=hashlib.sha256(text.encode()).hexdigest(), kind="url", size_bytes=0, licence=self.licence, origin=self.origin,
            reading=reading,
        )  # fmt: skip

    def _rows(self) -> Iterator[Row]:
        files = [self.path] if self.path.is_file() else sorted(item for item in self.path.iterdir() if item.is_file() and item.name[0] != ".")
        every = itertools.chain.from_iterable(self._checked(file) for file in files)
        return itertools.islice(every, self.limit_rows)

    def _checked(self, file: Path) -> Iterator[Row]:
        try:
            for row in rows(file):
                if row.number == 0 and row.error is None and not any(name in row.values for name in URL_COLUMNS):
                    raise mappings.MappingError(
                        f"the list {file} of source {self.name!r} has no column {URL_COLUMNS[0]!r}: its columns are "
                        f"{', '.join(map(repr, row.values)) or 'none'}"
                    )
                yield row
        except ShardError as error:
            raise mappings.MappingError(f"source {self.name!r}: {error}") from None


def _content(found: str) -> str:
    """What a digest keeps of an outcome: a stored file is named by its sha256, wherever the lake lies."""
    return found if found.startswith("error:") else Path(found).name


def _first(row: Row, names: tuple[str, ...]) -> str | None:
    for name in names:
        value = row.values.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip().encode("utf-8", "backslashreplace").decode()
    return None


def read_url(unit: Unit, limits: IngestSettings) -> list[Record]:
    """The one record of a unit: the image that was fetched, or the reason why there is none."""
    reading: UrlReading = unit.reading
    record = Record(key=unit.shard, caption=reading.caption, metadata={"url": reading.url or None, "licence": reading.licence})
    if reading.problem is not None:
        record.error, record.detail = "bad_row", reading.problem
        return [record]
    try:
        record.images[""] = ImageStore(None, limits, {reading.url: reading.found} if reading.found else {}).read_url(reading.url)
    except ImageUnavailable as problem:
        record.error, record.detail = problem.reason, problem.detail
    return [finish(record)]
