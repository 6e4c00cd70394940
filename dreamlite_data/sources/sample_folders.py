"""Read data sets that keep a folder per sample: a JSON file of what its rows share, JSON lines with a row each, and the images beside.
A unit is one such folder, digested by the content of its files."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dreamlite_data.settings import IngestSettings
from dreamlite_data.sources import mapping as mappings
from dreamlite_data.sources.base import DigestCache, Record, ShardError, Unit
from dreamlite_data.sources.mapped import ImageStore, records
from dreamlite_data.sources.mapped_source import MappedSource
from dreamlite_data.sources.row_files import rows
from dreamlite_data.sources.walk import folders_below


@dataclasses.dataclass(frozen=True)
class FolderReading:
    """How one folder is read."""

    mapping: mappings.Mapping


@dataclasses.dataclass(frozen=True)
class SampleFolderSource(MappedSource):
    """Every folder below `path` that holds the mapping's rows or shared file, in name order."""


    def units(self, digests: DigestCache) -> Iterator[Unit]:
        """One unit per sample folder. Raises MappingError where the first readable one lacks a mapped column."""
        files = _files(self.mapping)
        root = self.path.resolve()
        sign = files.rows or files.shared or "*"
        folders = (folder for folder in folders_below(root) if any(found.is_file() for found in folder.glob(sign)))
        checked, reading = False, FolderReading(self.mapping)
        for folder in itertools.islice(folders, self.limit_rows):
            if not checked:
                try:
                    mappings.check_rows(self.mapping, [row for _, row in _rows(folder, self.mapping) if isinstance(row, dict)], f"{self.name}/{folder.name}")
                    checked = True
                except ShardError:
                    pass  # a broken folder is quarantined when it is read
            members = sorted(item for item in folder.iterdir() if item.is_file() and not item.name.startswith("."))
            parts = [f"{item.name} {digests.digest(item)}" for item in members]
            content = hashlib.sha256("\n".join(parts).encode()).hexdigest()
            size_bytes = sum(item.stat().st_size for item in members)
            yield self.unit(folder.relative_to(root).as_posix(), str(folder), "samples", content, reading, size_bytes)


def read_folder(unit: Unit, limits: IngestSettings) -> list[Record]:
    """The records of one folder."""
    mapping = unit.reading.mapping
    images = ImageStore(unit.path, limits)
    found: list[Record] = []
    for key, row in _rows(Path(unit.path), mapping):
        found += [Record(key=key, error="bad_row", detail=row)] if isinstance(row, str) else records(mapping, key, row, images)
    return found


def _files(mapping: mappings.Mapping) -> mappings.SampleFiles:
    if mapping.samples is None:
        raise mappings.MappingError(f"the mapping {mapping.name!r} says nothing of folders: give it 'samples', or read it as {mapping.layouts[0]}")
    return mapping.samples


def _rows(folder: Path, mapping: mappings.Mapping) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(key, row, or why it has none) of a folder. An image's column holds its file name, so that the mapping sees a path like any other."""
    files = _files(mapping)
    shared: dict[str, Any] = {}
    if files.shared is not None:
        try:
            shared = json.loads((folder / files.shared).read_bytes())
        except (OSError, ValueError) as error:
            raise ShardError(f"{files.shared} cannot be read: {error}") from None
        if not isinstance(shared, dict):
            raise ShardError(f"{files.shared} is a JSON {type(shared).__name__}, not an object")
    if files.rows is None:
        yield "0", _with_images(shared, files)
        return
    for row in rows(folder / files.rows):
        yield str(row.number), row.error if row.error is not None else _with_images({**shared, **row.values}, files)


def _with_images(row: dict[str, Any], files: mappings.SampleFiles) -> dict[str, Any]:
    names = {column: re.sub(r"\{(\w+)\}", lambda match: str(row.get(match.group(1), "")), name) for column, name in files.images.items()}
    return {**row, **names}
