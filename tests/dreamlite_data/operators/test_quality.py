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
from dreamlite_data.operators.duplicates import NEAR_RADIUS_BITS, Duplicates
from dreamlite_data.operators.quality import Quality, measure, phash, sharpness, steepest_channel
from dreamlite_data.settings import PolicySettings


def _scenes(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([scenes.render(scenes.sample_scene(rng)) for _ in range(count)])


def _blurred(pixels: np.ndarray, sigma: float) -> np.ndarray:
    return np.rint(ndimage.gaussian_filter(pixels.astype(np.float32), (0, sigma, sigma, 0))).astype(np.uint8)


def test_the_default_threshold_parts_clean_scenes_from_blurred_ones() -> None:
    clean = _scenes(300)
    least = PolicySettings().min_sharpness
    assert sharpness(steepest_channel(clean)).min() > least
    assert sharpness(steepest_channel(_blurred(clean, 1.7))).max() < least


def test_sharpness_does_not_call_a_dim_picture_blurred() -> None:
    clean = _scenes(50)
    dim = (clean.astype(np.float32) * 0.25).astype(np.uint8)
    assert np.median(np.abs(sharpness(steepest_channel(dim)) - sharpness(steepest_channel(clean)))) < 0.1


def test_an_edge_of_known_blur_has_the_sharpness_of_the_formula() -> None:
    edge = np.zeros((64, 64), np.float32)
    edge[:, 32:] = 200
    for sigma in (1.5, 2.0):
        expected = 1 / (sigma * np.sqrt(2 * np.pi))
        got = float(sharpness(ndimage.gaussian_filter(edge, (0, sigma))[None])[0])
        assert got == pytest.approx(expected, rel=0.12)  # a 9 px window cuts the tails of the wider one


def test_a_batch_measures_each_image_as_if_alone() -> None:
    pixels = _scenes(8)
    together = measure(pixels)
    for index in range(len(pixels)):
        alone = measure(pixels[index : index + 1])
        assert {name: values[index].item() for name, values in together.items()} == {name: values[0].item() for name, values in alone.items()}


def test_flat_and_tiny_images_have_finite_measures() -> None:
    values = measure(np.full((1, 64, 64, 3), 128, np.uint8))
    assert all(np.isfinite(value).all() for value in values.values()) and values["sharpness"][0] == 0
    assert values["entropy_bits"][0] == 0


def test_a_row_that_cannot_be_measured_is_a_row() -> None:
    good = encode_png(_scenes(1)[0])
    answer = Quality()(pa.table({"image_id": ["a", "b", "c"], "bytes": [good, b"\xff\xd8 broken", encode_png(np.zeros((1, 1, 3), np.uint8))]}))
    rows = answer.to_pylist()
    assert rows[0]["error"] is None and rows[1]["error"] and "too small" in rows[2]["error"]
    assert rows[0]["sharpness"] > 0 and rows[1]["sharpness"] is None


def _photo(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(160, 160, 3)).cumsum(0).cumsum(1)
    noise -= noise.min((0, 1))
    return (255 * noise / noise.max((0, 1))).astype(np.uint8)


def _hash(pixels: np.ndarray) -> int:
    return int(phash(pixels[None].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32))[0])


def test_recompressed_photos_are_near_and_other_photos_are_not() -> None:
    for seed in range(8):
        photo = _photo(seed)
        buffer = io.BytesIO()
        Image.fromarray(photo).save(buffer, "JPEG", quality=80)
        again = np.asarray(Image.open(buffer))
        assert (_hash(photo) ^ _hash(again)).bit_count() <= NEAR_RADIUS_BITS
        assert (_hash(photo) ^ _hash(_photo(seed + 100))).bit_count() > NEAR_RADIUS_BITS


def _rows(entries: list[tuple[str, str, int, int]]) -> pa.Table:
    names = ("subject_id", "pixel_sha256", "phash", "min_side_px")
    types = (pa.string(), pa.string(), pa.uint64(), pa.int32())
    columns = zip(*entries, strict=True) if entries else ((),) * 4
    return pa.table({name: pa.array(column, kind) for name, column, kind in zip(names, columns, types, strict=True)})


NOBODY = _rows([]).append_column("group_id", pa.array([], pa.string()))


def test_duplicates_are_grouped_by_pixels_at_any_size_and_by_hash_only_where_large() -> None:
    rows = _rows([
        ("a", "p1", 0b0, 64), ("b", "p1", 0b0, 64), ("c", "p2", 0b1, 64),
        ("d", "p3", 0xF0F0, 256), ("e", "p4", 0xF0F1, 256), ("f", "p5", 0xFFFFFFFF, 256),
    ])  # fmt: skip
    answer = {row["subject_id"]: (row["group_id"], row["kind"], row["distance"]) for row in Duplicates(NOBODY)(rows).to_pylist()}
    assert answer == {
        "a": ("a", "first", 0), "b": ("a", "pixels", 0), "c": ("c", "first", 0), "d": ("d", "first", 0), "e": ("d", "near", 1),
        "f": ("f", "first", 0),
    }  # fmt: skip


def test_the_banded_index_finds_every_pair_within_the_radius() -> None:
    rng = np.random.default_rng(0)
    base = [int(value) for value in rng.integers(0, 2**63, 200, dtype=np.uint64)]
    near = [value ^ sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, NEAR_RADIUS_BITS + 1), replace=False)) for value in base]
    known = _rows([(f"a{n:03d}", f"p{n}", value, 256) for n, value in enumerate(base)])
    known = known.append_column("group_id", known["subject_id"])
    found = Duplicates(known)(_rows([(f"b{n:03d}", f"q{n}", value, 256) for n, value in enumerate(near)])).to_pylist()
    assert [row["group_id"] for row in found] == [f"a{n:03d}" for n in range(200)]


def test_new_images_join_old_groups_and_never_rename_them() -> None:
    first = Duplicates(NOBODY)(_rows([("m", "p1", 0b0, 256)]))
    known = _rows([("m", "p1", 0b0, 256)]).append_column("group_id", first["group_id"])
    later = Duplicates(known)(_rows([("a", "p1", 0b0, 256), ("b", "p2", 0b11, 256)])).to_pylist()
    assert [(row["group_id"], row["kind"]) for row in later] == [("m", "pixels"), ("m", "near")]
