"""Build the source that a user's settings describe, and refuse one that is not there or whose mapping does not go with it.
A refused source stops the refresh before anything is read or withdrawn."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping

from dreamlite_data.settings import ExtraSource
from dreamlite_data.sources import mapping as mappings
from dreamlite_data.sources.base import Source
from dreamlite_data.sources.folder import FolderSource
from dreamlite_data.sources.huggingface import HUB_ID, HuggingFaceSource
from dreamlite_data.sources.parquet import DEFAULT_MAPPING, ParquetSource
from dreamlite_data.sources.path_table import PathTableSource, nothing_downloaded
from dreamlite_data.sources.sample_folders import SampleFolderSource
from dreamlite_data.sources.url_list import UrlListSource
from dreamlite_data.sources.webdataset import WebDatasetSource

HUB_TIMEOUT_S = 10.0
FOLDERS_ONLY = ("folder", "webdataset", "sample_folders")
Outcomes = Callable[[list[str]], Mapping[str, str]]


def extra_source(settings: ExtraSource, outcomes: Outcomes = nothing_downloaded) -> Source:
    """The source; `outcomes` tells where the files of URLs are. Raises FileNotFoundError or MappingError."""
    _require_path(settings)
    common = {"name": settings.name, "path": settings.path, "licence": settings.licence, "origin": settings.origin}
    if settings.kind == "folder":
        return FolderSource(**common)
    if settings.kind == "url_list":
        return UrlListSource(**common, limit_rows=settings.limit_rows, outcomes=outcomes)
    mapping = _mapping(settings)
    if settings.kind == "webdataset":
        return WebDatasetSource(**common, mapping=mapping)
    rows = {**common, "mapping": mapping, "limit_rows": settings.limit_rows}
    if settings.kind == "sample_folders":
        return SampleFolderSource(**rows)
    rows |= {"image_root": settings.image_root}
    if settings.kind == "jsonl":
        return PathTableSource(**rows, rows_per_unit=settings.rows_per_unit, outcomes=outcomes)
    if settings.kind == "parquet":
        source = ParquetSource(**rows, unit_mb=settings.unit_mb)
        if source.holds_paths():
            return PathTableSource(**rows, rows_per_unit=settings.rows_per_unit, outcomes=outcomes)
        return source
    return HuggingFaceSource(
        **rows, config=settings.config, split=settings.split, revision=settings.revision, rows_per_unit=settings.rows_per_unit,
        unit_mb=settings.unit_mb,
    )  # fmt: skip


def _require_path(settings: ExtraSource) -> None:
    path = settings.path
    there = path.is_dir() if settings.kind in FOLDERS_ONLY else path.exists()
    if not there and not (settings.kind == "huggingface" and HUB_ID.fullmatch(str(path))):
        what = "folder" if settings.kind in FOLDERS_ONLY else "file or folder"
        raise FileNotFoundError(
            f"the source {settings.name!r} has no {what} at {path}: correct refresh.extra_sources, or mount it. Nothing was withdrawn"
        )


def _mapping(settings: ExtraSource) -> mappings.Mapping | None:
    if settings.mapping is None and settings.kind == "webdataset":
        return None
    mapping = mappings.load(settings.mapping or DEFAULT_MAPPING)
    if settings.kind not in mapping.layouts:
        raise mappings.MappingError(
            f"the mapping {mapping.name!r} of source {settings.name!r} is for kind {' or '.join(mapping.layouts)}, not {settings.kind!r}"
        )
    return mapping


def identity(settings: ExtraSource) -> str:
    """What besides the content of its files makes a source what it is: for the key of whoever decides whether to look again. A hub
    dataset is known by its id and revision alone, a mapping by its text."""
    parts = [settings.name, settings.kind]
    if settings.kind == "huggingface" and not settings.path.exists():
        parts += [str(settings.path), settings.revision or "main"]
    if settings.mapping is not None:
        try:
            parts.append(mappings.load(settings.mapping).model_dump_json())
        except mappings.MappingError as error:  # whoever reads the source will be told
            parts.append(str(error))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def hub_commit(settings: ExtraSource) -> str:
    """The commit that the revision of a hub dataset stands for now; the revision itself where the hub does not answer."""
    revision = settings.revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(str(settings.path), revision=revision, timeout=HUB_TIMEOUT_S).sha or revision
    except Exception:  # no network, no such dataset: reading it will say which
        return revision
