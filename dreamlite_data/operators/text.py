"""Read the words that stand in an image, and how much of it they cover.
For captions that must name legible words, for edits of text, and for screenshots and scans that are mostly text."""

from __future__ import annotations

import functools
import logging
from importlib import metadata
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from dreamlite_data import schema
from dreamlite_data.images import decode_stored
from dreamlite_data.operators.base import by_row

LOWEST_CONFIDENCE = 0.5  # rapidocr's own default for a line that is worth reporting
SHORTEST_LINE = 2
"""Characters. A lone one is more often a texture than a sign: rapidocr sees an '8' in the foam of skimage's coffee, at 0.90."""


class Text:
    """Operator over stored images."""

    name = "text"
    version = 1
    reads = ("image_id", "bytes")
    table = "op_text"
    resources = {"num_cpus": 1.0}
    schema = schema.OPERATORS["op_text"]

    def config(self) -> dict[str, Any]:
        return {"reader": f"rapidocr {metadata.version('rapidocr')}", "lowest_confidence": LOWEST_CONFIDENCE, "shortest_line": SHORTEST_LINE}

    def __call__(self, rows: pa.Table) -> pa.Table:
        return by_row(self._one, rows, "image_id", self.schema)

    @staticmethod
    def _one(row: dict[str, Any]) -> dict[str, Any]:
        pixels = decode_stored(row["bytes"])
        lines = _lines(pixels)
        return {
            "text_fraction": polygons_fraction([box for box, _ in lines], *pixels.shape[:2]),
            "lines": len(lines),
            "words": [word for _, line in lines for word in line.split()],
        }


def read_words(pixels: np.ndarray) -> tuple[list[str], float]:
    """The words in a picture, uint8 [H, W, 3], and the share of it that their lines cover."""
    lines = _lines(pixels)
    return [word for _, line in lines for word in line.split()], polygons_fraction([box for box, _ in lines], *pixels.shape[:2])


def _lines(pixels: np.ndarray) -> list[tuple[Any, str]]:
    """(polygon, text) of every line that is worth reporting."""
    seen = _reader()(np.ascontiguousarray(pixels[..., ::-1]))  # it expects OpenCV's order of channels
    found = [] if seen.boxes is None or seen.txts is None else zip(seen.boxes, seen.txts, strict=True)
    return [(box, line) for box, line in found if len(line.strip()) >= SHORTEST_LINE]


@functools.cache
def _reader() -> Any:
    from rapidocr import RapidOCR

    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    # Its wheel carries the weights of detection, direction and recognition. One thread, for every core has its own worker.
    threads = {"EngineConfig.onnxruntime.intra_op_num_threads": 1, "EngineConfig.onnxruntime.inter_op_num_threads": 1}
    return RapidOCR(params={"Global.text_score": LOWEST_CONFIDENCE, "Global.log_level": "error", **threads})


def polygons_fraction(polygons: Any, height: int, width: int) -> float:
    """Share of an image that lies in any of the polygons, each [points, 2] as (x, y) px."""
    inside = Image.new("1", (width, height))
    draw = ImageDraw.Draw(inside)
    for polygon in polygons:
        draw.polygon([(float(x), float(y)) for x, y in polygon], fill=1)
    return float(np.asarray(inside).mean())
