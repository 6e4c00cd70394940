"""On real pictures: a printed page is mostly words, coffee has none, and what is written in a picture is read."""

from __future__ import annotations

import io
from importlib.util import find_spec

import numpy as np
import pyarrow as pa
import pytest
import skimage.data
from PIL import Image, ImageDraw, ImageFont

from dreamlite_data.operators.text import Text, polygons_fraction

pytestmark = pytest.mark.skipif(find_spec("rapidocr") is None, reason="the extra ocr is not installed")


def rows_of(*images: np.ndarray) -> pa.Table:
    payloads = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).convert("RGB").save(buffer, "PNG")
        payloads.append(buffer.getvalue())
    return pa.table({"image_id": [str(index) for index in range(len(images))], "bytes": pa.array(payloads, pa.binary())})


def sign(words: str) -> np.ndarray:
    image = Image.new("RGB", (320, 120), "white")
    ImageDraw.Draw(image).text((20, 35), words, fill="black", font=ImageFont.load_default(40))
    return np.asarray(image)


def test_a_page_is_text_a_sign_is_read_and_coffee_is_neither() -> None:
    page, shop, coffee = Text()(rows_of(skimage.data.page(), sign("Summer Sale 50"), skimage.data.coffee())).to_pylist()
    assert page["text_fraction"] > 0.2 and page["lines"] >= 5 and len(page["words"]) > 20
    assert shop["words"] == ["Summer", "Sale", "50"] and 0.05 < shop["text_fraction"] < 0.6
    assert coffee["text_fraction"] == 0 and coffee["lines"] == 0 and coffee["words"] == []
    assert all(row["error"] is None for row in (page, shop, coffee))


def test_a_bad_image_is_a_row_with_its_reason() -> None:
    [row] = Text()(pa.table({"image_id": ["broken"], "bytes": pa.array([b"no image"], pa.binary())})).to_pylist()
    assert row["subject_id"] == "broken" and "UnidentifiedImageError" in row["error"] and row["words"] is None


def test_overlapping_lines_cover_their_area_once() -> None:
    square = [(0, 0), (9, 0), (9, 19), (0, 19)]  # pixels 0 to 9 by 0 to 19, borders included
    assert polygons_fraction([square, square], 20, 20) == 0.5
    assert polygons_fraction([], 20, 20) == 0
