"""Write shards as WebDataset tars: key.png, key.txt and key.json for an image with its caption, key.source.png, key.target.png and
key.json for a triplet. Our own webdataset source reads them back as the same rows."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from dreamlite_data.lake import Lake
from dreamlite_data.publishing.rows import Shard, row_groups

SUFFIXES = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}


def write_tar(lake: Lake, shard: Shard, folder: Path) -> Path:
    """Write one shard below `folder`. Times and owners are zero, so equal rows give equal bytes."""
    path = folder / f"{shard.stem}.tar"
    number = 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for group in row_groups(lake, shard.rows):
            for row in group:
                for suffix, payload in _members(row).items():
                    member = tarfile.TarInfo(f"{shard.index:05d}{number:07d}.{suffix}")
                    member.size = len(payload)
                    tar.addfile(member, io.BytesIO(payload))
                number += 1
    return path


def _members(row: dict[str, Any]) -> dict[str, bytes]:
    facts = {name: row[name] for name in ("row_id", "licence", "url", "source", "weight", "split", "made_of") if row[name] is not None}
    image = SUFFIXES[row["mime"]]
    if row["task"] != "edit":
        words = {"txt": row["text"].encode()} if row["text"] else {}
        return {image: row["image_bytes"], **words, "json": _json(facts)}
    facts |= {"instruction": row["text"], "edit_type": row["edit_type"], "edited_fraction": row["edited_fraction"]}
    facts |= {"edit_mask_hex": row["edit_mask"].hex()} if row["edit_mask"] else {}
    return {f"source.{SUFFIXES[row['source_mime']]}": row["source_bytes"], f"target.{image}": row["image_bytes"], "json": _json(facts)}


def _json(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()
