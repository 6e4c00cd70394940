"""Write shards as Parquet that `datasets.load_dataset` opens with decoded images and the hub's viewer can page through."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dreamlite_data.lake import Lake
from dreamlite_data.publishing.rows import GROUP_ROWS, Shard, row_groups
from dreamlite_data.thumbnails import mask_png

IMAGE_COLUMNS = ("source_image", "image", "mask")
_COLUMNS = {
    "generate": ("image", "text"),
    "edit": ("source_image", "image", "text", "edit_type", "edited_fraction", "mask", "made_of"),
}
_FACTS = ("row_id", "image_id", "source_image_id", "width", "height", "weight", "source", "url", "licence")
_KINDS = {"edited_fraction": "float32", "weight": "float32", "width": "int32", "height": "int32"}


def features(task: str) -> Any:
    """The `datasets.Features` of a task's rows."""
    from datasets import Features, Image, Value

    names = [name for name in (*_COLUMNS[task], *_FACTS) if task == "edit" or name != "source_image_id"]
    return Features({name: Image() if name in IMAGE_COLUMNS else Value(_KINDS.get(name, "string")) for name in names})


@functools.cache
def _schema(task: str) -> pa.Schema:
    return features(task).arrow_schema  # carries the features in its metadata, where load_dataset looks for them


def write_parquet(lake: Lake, shard: Shard, folder: Path) -> Path:
    """Write one shard below `folder`. Images lie as they are stored; the narrow columns are compressed. Equal rows give equal bytes."""
    schema = _schema(shard.task)
    path = folder / f"{shard.stem}.parquet"
    wide = [f"{name}.bytes" for name in IMAGE_COLUMNS if name in schema.names]
    leaves = [leaf for name in schema.names for leaf in ((f"{name}.bytes", f"{name}.path") if name in IMAGE_COLUMNS else (name,))]
    narrow = [leaf for leaf in leaves if leaf not in wide]
    with pq.ParquetWriter(
        path,
        schema,
        compression={leaf: "none" if leaf in wide else "zstd" for leaf in leaves},
        use_dictionary=narrow,
        write_statistics=narrow,
        write_page_index=True,
        # Cut pages where the content says so: a republished version shares most of its chunks with the one before on the hub.
        use_content_defined_chunking=True,
    ) as writer:
        for group in row_groups(lake, shard.rows):
            rows = [{name: _value(name, row) for name in schema.names} for row in group]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema), row_group_size=GROUP_ROWS)
    return path


def _value(name: str, row: dict[str, Any]) -> Any:
    if name == "image":
        return {"bytes": row["image_bytes"], "path": None}
    if name == "source_image":
        return {"bytes": row["source_bytes"], "path": None}
    if name == "mask":
        return {"bytes": mask_png(row["edit_mask"]), "path": None} if row["edit_mask"] else None
    return row[name]
