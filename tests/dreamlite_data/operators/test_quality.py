"""Measures of images: blur is told from dim and flat, hashes are equal for equal pictures only, one batch is like one image."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from scipy import ndimage

from dreamlite_data import scenes
from dreamlite_data.images import encode_png
from dreamlite_data.operators import appearance
from dreamlite_data.operators.appearance import Appearance, cell_means, pixel_hash
from dreamlite_data.operators.duplicates import NEAR_RADIUS_BITS
from dreamlite_data.operators.ingest import Ingest
from dreamlite_data.operators.quality import Quality
from dreamlite_data.settings import IngestSettings, PolicySettings


def _scenes(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [scenes.render(scenes.sample_scene(rng)) for _ in range(count)]


def _blurred(pixels: np.ndarray, sigma: float) -> np.ndarray:
    return np.rint(ndimage.gaussian_filter(pixels.astype(np.float32), (sigma, sigma, 0))).astype(np.uint8)


def _photo(seed: int, side: int = 160) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(side, side, 3)).cumsum(0).cumsum(1)
    noise -= noise.min((0, 1))
    return (255 * noise / noise.max((0, 1))).astype(np.uint8)


def _measures(images: list[np.ndarray]) -> dict[str, list]:
    looks = Appearance()
    for pixels in images:
        looks.add(pixels)
    return {name: np.asarray(values).tolist() for name, values in looks.measures().items()}


def _jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def test_the_default_threshold_parts_clean_scenes_from_blurred_ones() -> None:
    clean = _scenes(300)
    least = PolicySettings().min_sharpness
    assert min(_measures(clean)["sharpness"]) > least
    assert max(_measures([_blurred(pixels, 1.7) for pixels in clean])["sharpness"]) < least / 1.5


def test_sharpness_does_not_call_a_dim_picture_blurred() -> None:
    clean = _scenes(50)
    dim = [(pixels.astype(np.float32) * 0.25).astype(np.uint8) for pixels in clean]
    assert np.median(np.abs(np.subtract(_measures(dim)["sharpness"], _measures(clean)["sharpness"]))) < 0.1


def test_an_edge_of_known_blur_has_the_sharpness_of_the_formula() -> None:
    edge = np.zeros((64, 64), np.float32)
    edge[:, 32:] = 200
    for sigma in (1.5, 2.0):
        soft = np.repeat(np.rint(ndimage.gaussian_filter(edge, (0, sigma))).astype(np.uint8)[..., None], 3, axis=2)
        assert _measures([soft])["sharpness"][0] == pytest.approx(1 / (sigma * np.sqrt(2 * np.pi)), rel=0.06)


def test_one_sharp_corner_of_a_large_blurred_picture_is_found() -> None:
    soft = _blurred(_photo(3, 640), 6.0)
    sharp = soft.copy()
    sharp[500:580, 20:100] = np.kron(np.random.default_rng(0).integers(0, 2, (10, 10)), np.ones((8, 8)))[..., None] * 200
    before, after = _measures([soft, sharp])["sharpness"]
    assert before < 0.4 and after > 0.8


@pytest.mark.parametrize("shape", [(2, 2), (7, 300), (64, 64), (100, 33), (427, 640), (1000, 30)])
def test_any_shape_is_measured_with_finite_values(shape: tuple[int, int]) -> None:
    values = _measures([np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)])
    assert all(np.isfinite(column[0]) for name, column in values.items() if name != "pixel_hash")


def test_a_batch_measures_each_image_as_if_alone() -> None:
    images = [*_scenes(appearance.BATCH + 3), _photo(1), _photo(2, 300), *_scenes(3, seed=9)]
    together = _measures(images)
    for index, pixels in enumerate(images):
        assert {name: [values[index]] for name, values in together.items()} == _measures([pixels])


def test_flat_images_have_no_sharpness_no_entropy_and_one_hash() -> None:
    values = _measures([np.full((64, 64, 3), level, np.uint8) for level in (0, 128, 255)])
    assert values["sharpness"] == [0, 0, 0] and values["entropy_bits"] == [0, 0, 0] and values["contrast"] == [0, 0, 0]
    assert values["dark_fraction"] == [1, 0, 0] and values["light_fraction"] == [0, 0, 1] and values["clipped_fraction"] == [1, 0, 1]
    assert len(set(values["pixel_hash"])) == 3


def test_values_of_a_known_picture() -> None:
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, 32:] = 255
    values = {name: column[0] for name, column in _measures([halves]).items()}
    assert values["entropy_bits"] == 1 and values["brightness"] == 0.5 and values["contrast"] == 0.5 and values["sharpness"] == 1
    assert values["colourfulness"] == 0
    red = np.zeros((64, 64, 3), np.uint8)
    red[..., 0] = 200
    assert _measures([red])["colourfulness"][0] == pytest.approx(0.3 * np.hypot(200, 100))  # eq. M3 without spread


def test_cell_means_are_means_by_area() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 100, 3), dtype=np.uint8)
    fine = np.repeat(pixels.astype(np.float64) @ (np.array(appearance.LUMA_256) / 256), 32, axis=1)  # 3200 columns: cells end on whole ones
    expected = fine.reshape(32, 2, 32, 100).mean((1, 3))
    assert np.allclose(cell_means(pixels), expected, atol=1e-3)


def test_pixels_are_known_by_content_and_shape() -> None:
    pixels = _photo(0)
    assert pixel_hash(pixels) == pixel_hash(pixels.copy()) == pixel_hash(np.asfortranarray(pixels))
    other = pixels.copy()
    other[80, 80, 1] ^= 1
    assert len({pixel_hash(pixels), pixel_hash(other), pixel_hash(pixels.reshape(80, 320, 3))}) == 3


def test_recompressed_photos_are_near_and_other_photos_are_not() -> None:
    for seed in range(8):
        photo = _photo(seed)
        again = np.asarray(Image.open(io.BytesIO(_jpeg(photo, 80))))
        first, second, other = _measures([photo, again, _photo(seed + 100)])["phash"]
        assert (first ^ second).bit_count() <= NEAR_RADIUS_BITS
        assert (first ^ other).bit_count() > NEAR_RADIUS_BITS


def test_a_row_that_cannot_be_measured_is_a_row() -> None:
    good = encode_png(_scenes(1)[0])
    answer = Quality()(pa.table({"image_id": ["a", "b", "c"], "bytes": [good, b"\xff\xd8 broken", encode_png(np.zeros((1, 1, 3), np.uint8))]}))
    rows = answer.to_pylist()
    assert rows[0]["error"] is None and rows[1]["error"] and "too small" in rows[2]["error"]
    assert rows[0]["sharpness"] > 0 and rows[1]["sharpness"] is None


def test_ingest_and_the_operator_measure_the_same() -> None:
    grey, clear = Image.fromarray(_photo(5)).convert("L"), Image.fromarray(_photo(6)).convert("RGBA")
    payloads = [_jpeg(_photo(4)), encode_png(_scenes(1)[0]), encode_png(np.zeros((1, 9, 3), np.uint8))]
    for image in (grey, clear):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        payloads.append(buffer.getvalue())
    answers, from_ingest = Ingest(IngestSettings()).examine([*payloads[:2], b"no image", *payloads[2:]])
    stored = [answer for answer in answers if not answer["error"]]
    from_bytes = Quality()(pa.table({"image_id": [row["image_id"] for row in stored], "bytes": [row["bytes"] for row in stored]}))
    assert from_ingest.equals(from_bytes) and len(stored) == 5 and from_ingest["sharpness"].null_count == 1
