"""Small pictures and lakes for the tests of table sources: every picture is told apart by one number."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dreamlite_data import executors, refresh
from dreamlite_data.lake import Lake
from dreamlite_data.settings import RefreshSettings

SIZE_PX = (24, 16)  # width, height


def picture(number: int, size_px: tuple[int, int] = SIZE_PX) -> bytes:
    """A PNG of noise; the same number gives the same bytes."""
    pixels = np.random.default_rng(number).integers(0, 256, (size_px[1], size_px[0], 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


def encoded(image: Image.Image) -> bytes:
    """Any image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def cell(number: int) -> dict[str, Any]:
    """An image as Hugging Face writes it into Parquet."""
    return {"bytes": picture(number), "path": f"{number}.png"}


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    """The rows as a Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def settings_of(*sources: dict[str, Any], **changes: Any) -> RefreshSettings:
    """A refresh of these sources alone."""
    return RefreshSettings(scenes={"t2i_rows": 0, "edit_rows": 0}, photos={"enabled": False}, extra_sources=sources, **changes)


def ingest(lake: Lake, *sources: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Read the sources into the lake in this process; returns the counts."""
    return refresh.ingest(lake, settings_of(*sources, **changes), executors.local())


def rows(lake: Lake, sql: str) -> list[dict[str, Any]]:
    """The answer of a query as dicts."""
    return lake.query(sql).to_pylist()
