"""Publish a dataset version: a folder of Parquet or WebDataset shards with a dataset card and the sha256 of every file.
The folder appears whole or not at all, and publishing the same version again gives the same bytes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from dreamlite_data.dataset import DatasetError, open_dataset
from dreamlite_data.lake import Lake
from dreamlite_data.progress import Progress
from dreamlite_data.publishing.card import data_folder, write_card
from dreamlite_data.publishing.rows import SHARD_BYTES, cut_shards, select_rows

FORMATS = ("huggingface", "webdataset")
MANIFEST = "manifest.json"


def publish(
    lake: Lake,
    name: str,
    version: int | None,
    folder: Path,
    format_: str = "huggingface",
    include_restricted: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write version `version` (the newest for None) of a dataset to `folder`, which must not exist yet. Returns the manifest.
    Rows whose licence forbids passing them on or deriving from them, or is unknown, stay out and are counted, unless
    `include_restricted`. Raises DatasetError."""
    if format_ not in FORMATS:
        raise DatasetError(f"there is no format {format_!r}: choose {' or '.join(FORMATS)}")
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DatasetError(f"{folder} is there already: publish to a new folder, or remove that one first")
    dataset = open_dataset(lake, name, version)
    published = select_rows(lake, dataset, include_restricted)
    shards = cut_shards(published.rows, shard_bytes)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.draft")
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a draft that is found below is then of a process that is gone
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            written = _write_shards(lake, published, shards, draft, format_)
            write_card(lake, published, shards, draft, format_, _features(shards, format_))
            manifest = _manifest(published, written, draft, format_)
            (draft / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            if folder.exists():
                folder.rmdir()  # empty, as was checked
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            Path(lock.name).unlink(missing_ok=True)
    return manifest


def _features(shards: list[Any], format_: str) -> dict[str, Any]:
    from dreamlite_data.publishing import huggingface

    return {task: huggingface.features(task) for task in {shard.task for shard in shards}} if format_ == "huggingface" else {}


def _write_shards(lake: Lake, published: Any, shards: list[Any], draft: Path, format_: str) -> dict[str, int]:
    """{path below the draft: rows} of every shard."""
    if format_ == "huggingface":
        from dreamlite_data.publishing.huggingface import write_parquet as write
    else:
        from dreamlite_data.publishing.webdataset import write_tar as write
    written = {}
    with Progress("publish", total=len(published.rows), unit="rows") as bar:
        for shard in shards:
            below = draft / data_folder(published, shard.task)
            below.mkdir(parents=True, exist_ok=True)
            path = write(lake, shard, below)
            written[path.relative_to(draft).as_posix()] = len(shard.rows)
            bar.advance(len(shard.rows))
    return written


def _manifest(published: Any, written: dict[str, int], draft: Path, format_: str) -> dict[str, Any]:
    dataset = published.dataset
    files = []
    for path in sorted(item for item in draft.rglob("*") if item.is_file()):
        relative = path.relative_to(draft).as_posix()
        with path.open("rb") as handle:
            sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
        rows = {"rows": written[relative]} if relative in written else {}
        files.append({"path": relative, "sha256": sha256, "size_bytes": path.stat().st_size, **rows})
    return {
        "dataset": dataset.name,
        "version": dataset.version,
        "digest": dataset.digest,
        "format": format_,
        "rows": len(published.rows),
        "left_out": [{"licence": name, "why": why, "rows": rows} for (name, why), rows in published.left_out.items()],
        "licences": [licence.name for licence in published.licences],
        "files": files,
    }
