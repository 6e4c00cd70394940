"""What sources whose columns a mapping names have in common: their settings, and how a unit of theirs is named.
A unit's digest holds how it is read as well as its content, for another mapping makes other records of the same bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from dreamlite_data.sources import mapping as mappings
from dreamlite_data.sources.base import Unit

PEEKED_ROWS = 100
"""Rows whose columns together are taken for those of a file."""


@dataclasses.dataclass(frozen=True)
class MappedSource:
    """`licence` and `origin` stand in for the mapping's own; of a row past `limit_rows` nothing is read."""

    name: str
    path: Path
    mapping: mappings.Mapping
    domain: str = "other"
    licence: str | None = None
    origin: str | None = None
    limit_rows: int | None = None

    def unit(self, shard: str, path: str, kind: str, content: str, reading: Any, size_bytes: int = 0) -> Unit:
        """A unit of this source, whose bytes are named by `content`."""
        return Unit(
            source=self.name, domain=self.domain, shard=shard, path=path, digest=unit_digest(content, reading), kind=kind,
            size_bytes=size_bytes, licence=self.licence or self.mapping.licence, origin=self.origin or self.mapping.origin, reading=reading,
        )  # fmt: skip


def unit_digest(content: str, reading: Any) -> str:
    """Digest of a unit: what its bytes are and how they are read."""
    how = {
        field.name: value.model_dump(mode="json") if isinstance(value, mappings.Mapping) else value
        for field in dataclasses.fields(reading)
        if (value := getattr(reading, field.name)) is not None and field.name != "image_root"
    }
    text = json.dumps([content, mappings.READER_VERSION, how], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
