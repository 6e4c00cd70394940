"""Read a folder of images with sidecars: `name.jpg` beside `name.txt` (caption) and `name.json` (metadata).
Every file is accounted for: one that is no image becomes the row of a failure."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from dreamlite_data.settings import IngestSettings
from dreamlite_data.sources.base import (
    CAPTION_SUFFIXES,
    METADATA_SUFFIX,
    DigestCache,
    Record,
    Unit,
    finish,
    over_limit,
    read_sidecar,
)
from dreamlite_data.sources.walk import files_below

SIDECAR_SUFFIXES = tuple(f".{suffix}" for suffix in (*CAPTION_SUFFIXES, METADATA_SUFFIX))


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Every file below `path` in name order, hidden ones apart. Links that lead out of the folder are not followed."""

    name: str
    path: Path
    domain: str = "other"
    licence: str | None = None
    origin: str | None = None

    def units(self, digests: DigestCache) -> Iterator[Unit]:
        """One unit per image, named by its relative path; a sidecar without an image is a unit of its own. In the order of the paths
        without suffix, with no more in hand than the files of one name."""
        root = self.path.resolve()
        for _, found in itertools.groupby(files_below(root, by_stem=True), lambda file: file.with_suffix("")):
            files = [file for file in found if not file.is_symlink() or file.resolve().is_relative_to(root)]
            beside = [file for file in files if file.suffix.lower() in SIDECAR_SUFFIXES]
            for file in [file for file in files if file not in beside] or beside[:1]:
                parts = [digests.digest(item) for item in (file, *beside)]
                shard = os.fsencode(file.relative_to(root)).decode("utf-8", "backslashreplace")
                yield Unit(
                    source=self.name, domain=self.domain, shard=shard, path=str(file),
                    digest=hashlib.sha256("".join(parts).encode()).hexdigest(), kind="file", size_bytes=file.stat().st_size,
                    licence=self.licence, origin=self.origin, sidecars=tuple(str(item) for item in beside),
                )  # fmt: skip


def read_file(unit: Unit, limits: IngestSettings) -> list[Record]:
    """The one record of a unit."""
    record = Record(key=unit.shard)
    try:
        for sidecar in unit.sidecars:
            if over_limit(Path(sidecar).stat().st_size, limits) is None:
                read_sidecar(record, Path(sidecar).suffix[1:].lower(), Path(sidecar).read_bytes())
        if unit.path not in unit.sidecars:
            problem = over_limit(unit.size_bytes, limits)
            if problem:
                record.error, record.detail = "too_large", problem
            else:
                record.images[""] = Path(unit.path).read_bytes()
    except OSError as error:
        record.error, record.detail = "unreadable", str(error)
    record.metadata.pop("instruction", None)  # a single image cannot be a triplet
    return [finish(record)]
