"""Small pictures of stored images and of edit masks, for contact sheets and dataset cards.
Equal input gives equal bytes, so that a page or a card is as reproducible as the rows it shows."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from dreamlite_data.images import decode_stored, encode_png
from dreamlite_data.operators.change import MASK_CELLS

_JPEG_QUALITY = 82


def thumbnail(payload: bytes, side_px: int) -> tuple[bytes, str]:
    """(file bytes, mime) of stored image bytes, at most `side_px` px on the longer side: PNG where the image is that small
    already (drawings stay sharp), else JPEG."""
    pixels = decode_stored(payload)
    height, width = pixels.shape[:2]
    if max(height, width) <= side_px:
        return encode_png(pixels), "image/png"
    scale = side_px / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue(), "image/jpeg"


def mask_png(mask: bytes, cell_px: int = 1) -> bytes:
    """An edit mask (see `change.mask_cells`) as a grey PNG of 8 x 8 cells, each `cell_px` px wide."""
    cells = np.frombuffer(mask, np.uint8).reshape(MASK_CELLS, MASK_CELLS)
    buffer = io.BytesIO()
    Image.fromarray(np.kron(cells, np.ones((cell_px, cell_px), np.uint8)), "L").save(buffer, "PNG")
    return buffer.getvalue()


def data_url(payload: bytes, mime: str) -> str:
    """`payload` as a URL that holds it, so that a page needs no other file."""
    return f"data:{mime};base64,{base64.b64encode(payload).decode()}"
