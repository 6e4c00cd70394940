"""Where rows come from. Every source lists units; `read` gives the records of one."""

from __future__ import annotations

from dreamlite_data.settings import IngestSettings
from dreamlite_data.sources.base import DigestCache, Record, ShardError, Source, Unit
from dreamlite_data.sources.folder import FolderSource, read_file
from dreamlite_data.sources.webdataset import WebDatasetSource, read_shard

__all__ = ["DigestCache", "FolderSource", "Record", "ShardError", "Source", "Unit", "WebDatasetSource", "read"]


def read(unit: Unit, limits: IngestSettings) -> list[Record]:
    """The records of `unit`; raises ShardError where it cannot be read to its end."""
    return read_shard(unit, limits) if unit.kind == "tar" else read_file(unit, limits)
