"""Read a folder of images with sidecars: `name.jpg` beside `name.txt` (caption) and `name.json` (metadata).
Every file is accounted for: one that is no image becomes the row of a failure."""

from __future__ import annotations

import dataclasses
import hashlib
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
    hidden,
    over_limit,
    read_sidecar,
)

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
        """One unit per image, named by its relative path; a sidecar without an image is a unit of its own."""
        root = self.path.resolve()
        files = sorted(file for file in root.rglob("*") if file.is_file() and not hidden(file.relative_to(root)))
        inside = [file for file in files if file.resolve().is_relative_to(root)]
        sidecars: dict[Path, list[Path]] = {}
        images: dict[Path, list[Path]] = {}
        for file in inside:
            (sidecars if file.suffix.lower() in SIDECAR_SUFFIXES else images).setdefault(file.with_suffix(""), []).append(file)
        for stem, members in sorted({**{stem: [] for stem in sidecars}, **images}.items()):
            beside = sidecars.get(stem, [])
            for file in members or beside[:1]:
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
