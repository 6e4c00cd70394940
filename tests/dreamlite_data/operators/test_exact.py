"""Exact operations are what their words say, can be checked by doing them again, and go back only where that is exact."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from dreamlite_data.images import decode_stored, encode_png
from dreamlite_data.operators.edit import Edit, ExactEditor
from dreamlite_data.operators.exact import OPERATIONS, is_exact, recognise
from dreamlite_data.operators.verify import VerifyEdit
from tests.dreamlite_data.operators.triplets import triplet_rows


def _photo(seed: int = 0, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    down, across = np.mgrid[: size[0], : size[1]]
    base = np.stack([down * 2, across * 2, 120 + 40 * np.sin(down / 5)], axis=-1)
    return np.clip(base + rng.normal(0, 12, base.shape), 0, 200).astype(np.uint8)


def _id(pixels: np.ndarray) -> str:
    return hashlib.sha256(encode_png(pixels)).hexdigest()


def test_every_wording_means_one_operation() -> None:
    image_id = "c" * 64
    for inverse in (False, True):
        texts: dict[str, str] = {}
        for operation in OPERATIONS.values():
            words = operation.inverse if inverse else operation.words
            for _, text, prompt_id in operation.forms(words, image_id) if words else ():
                assert texts.setdefault(text, operation.name) == operation.name, text
                assert recognise(text, image_id, inverse) is operation, prompt_id
                assert "{" not in text and text == text.strip()


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_target_is_known_as_exact_and_another_is_not(name: str) -> None:
    operation, photo = OPERATIONS[name], _photo()
    source_id = _id(photo)
    target = operation(photo, source_id)
    assert target.shape == photo.shape and target.dtype == np.uint8
    target_id = _id(target)
    spoilt = target.copy()
    spoilt[3, 3] ^= 1
    for _, text, _ in operation.forms(operation.words, source_id):
        assert is_exact(text, photo, source_id, target, target_id) is True
        assert is_exact(text, photo, source_id, spoilt, _id(spoilt)) is False
    if operation.inverse is not None and operation.can_be_undone(photo, source_id):
        for _, text, _ in operation.forms(operation.inverse, source_id):
            assert is_exact(text, target, target_id, photo, source_id) is True
            assert is_exact(text, spoilt, _id(spoilt), photo, source_id) is False
    assert is_exact("paint the roof red", photo, source_id, target, target_id) is None


def test_brightening_is_undone_only_where_nothing_was_clipped() -> None:
    operation = OPERATIONS["brighten"]
    light = np.full((64, 64, 3), 250, np.uint8)
    assert operation.can_be_undone(_photo() // 4, "d" * 64) and not operation.can_be_undone(light, "d" * 64)
    dark_again = operation.inverse.short[0]
    assert is_exact(dark_again, operation(light, _id(light)), "x", light, _id(light)) is False


def test_amounts_come_from_the_image_and_differ_between_images() -> None:
    drawn = {OPERATIONS["zoom"].amounts(f"{number:064x}")["place"] for number in range(60)}
    assert len(drawn) == 5
    first, second = (OPERATIONS["noise"](_photo(), image_id) for image_id in ("a" * 64, "b" * 64))
    assert not np.array_equal(first, second) and np.array_equal(first, OPERATIONS["noise"](_photo(), "a" * 64))


@pytest.mark.parametrize("inverse", [False, True])
def test_the_operator_makes_verified_triplets_with_every_wording(inverse: bool) -> None:
    photos = [_photo(seed, (64, 96)) for seed in range(3)]
    rows = pa.table({"image_id": [_id(photo) for photo in photos], "bytes": [encode_png(photo) for photo in photos]})
    operator = Edit(5, editor=ExactEditor(inverse))
    answer = operator(rows)
    tables = operator.side_tables(rows, answer)
    edits = tables["edits"].to_pylist()
    assert answer["edits"].to_pylist() == [5, 5, 5] and answer["error"].null_count == 3
    assert sorted(edit_id for ids in answer["edit_ids"].to_pylist() for edit_id in ids) == [row["edit_id"] for row in edits]
    assert sum(row["relation"] == "" for row in edits) == 15 and bool(sum(row["relation"] == "inverse" for row in edits)) == inverse
    payloads = dict(zip(rows["image_id"].to_pylist(), rows["bytes"].to_pylist(), strict=True))
    payloads |= dict(zip(tables["images"]["image_id"].to_pylist(), tables["images"]["bytes"].to_pylist(), strict=True))
    for row in edits:
        assert row["parent_edit_id"] in ({edit["edit_id"] for edit in edits} if row["relation"] else {None})
    given = triplet_rows([
        (decode_stored(payloads[row["source_image_id"]]), decode_stored(payloads[row["target_image_id"]]), row["instruction"]) for row in edits
    ])  # fmt: skip
    assert all(row["matches"] for row in VerifyEdit()(given).to_pylist())
    texts: dict[str, set[str]] = {}
    for row in tables["instructions"].to_pylist():
        texts.setdefault(row["edit_id"], set()).add(row["text"])
    assert all(row["instruction"] in texts[row["edit_id"]] and len(texts[row["edit_id"]]) > 1 for row in edits)
    assert operator(rows).equals(answer)


def test_an_operation_that_does_nothing_makes_no_triplet() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    operator = Edit(50)
    answer = operator(pa.table({"image_id": ["f" * 64], "bytes": [encode_png(grey)]}))
    types = set(operator.side_tables(None, answer)["edits"]["edit_type"].to_pylist())
    assert answer["edits"][0].as_py() >= 3 and not types & {"mirror", "greyscale", "hue", "saturation", "blur", "zoom"}
