"""Where rows come from. Every source lists units; `read` gives the records of one."""

from __future__ import annotations

from dreamlite_data.settings import IngestSettings
from dreamlite_data.sources.base import DigestCache, Record, ShardError, Source, Unit
from dreamlite_data.sources.extra import extra_source
from dreamlite_data.sources.folder import FolderSource, read_file
from dreamlite_data.sources.huggingface import HuggingFaceSource, read_saved, read_stream
from dreamlite_data.sources.parquet import ParquetSource, read_parquet
from dreamlite_data.sources.path_table import PathTableSource, read_table
from dreamlite_data.sources.sample_folders import SampleFolderSource, read_folder
from dreamlite_data.sources.url_list import UrlListSource, read_url
from dreamlite_data.sources.webdataset import WebDatasetSource, read_mapped_shard, read_shard

__all__ = [
    "DigestCache", "FolderSource", "HuggingFaceSource", "ParquetSource", "PathTableSource", "Record", "SampleFolderSource", "ShardError",
    "Source", "Unit", "UrlListSource", "WebDatasetSource", "extra_source", "read",
]  # fmt: skip

READERS = {
    "file": read_file, "url": read_url, "parquet": read_parquet, "saved": read_saved, "stream": read_stream, "table": read_table,
    "samples": read_folder,
}  # fmt: skip


def read(unit: Unit, limits: IngestSettings) -> list[Record]:
    """The records of `unit`; raises ShardError where it cannot be read to its end."""
    if unit.kind == "tar":
        return read_shard(unit, limits) if unit.reading is None else read_mapped_shard(unit, limits)
    return READERS[unit.kind](unit, limits)
