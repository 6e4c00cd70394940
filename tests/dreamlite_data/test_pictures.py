"""A picture that was made is found again by its call alone, the folder stays within its bound, and a takedown finds what is in it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from dreamlite_data.images import encode_png
from dreamlite_data.pictures import Pictures
from dreamlite_data.responses import Call

CALL = Call("edit", "weights-1", "make it blue", {"steps": 4, "seed": 7}, ("1" * 64,))
NOISE = encode_png(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))  # about 120 KB, as noise does not compress


@pytest.mark.parametrize(
    "changes", [{"model": "weights-2"}, {"prompt": "make it red"}, {"settings": {"steps": 4, "seed": 8}}, {"inputs": ("2" * 64,)}]
)
def test_anything_that_decides_the_picture_makes_another_call(tmp_path: Path, changes: dict) -> None:
    Pictures(tmp_path, 1).keep(CALL, NOISE)
    assert Pictures(tmp_path, 1).find(dataclasses.replace(CALL)) == NOISE
    assert Pictures(tmp_path, 1).find(dataclasses.replace(CALL, **changes)) is None


def test_a_torn_picture_is_none(tmp_path: Path) -> None:
    pictures = Pictures(tmp_path, 1)
    pictures.keep(CALL, NOISE)
    [file] = tmp_path.rglob("*.png")
    file.write_bytes(NOISE[:-9])
    assert pictures.find(CALL) is None


def test_what_was_not_used_for_longest_goes_when_the_bound_is_reached(tmp_path: Path) -> None:
    pictures = Pictures(tmp_path, 1)
    calls = [dataclasses.replace(CALL, settings={"seed": seed}) for seed in range(12)]
    for age, call in enumerate(reversed(calls)):
        pictures.keep(call, NOISE)
        os.utime(pictures._path(call), (age, age))  # the higher the seed the older
    assert pictures.find(calls[11]) == NOISE  # used just now
    fits = 2**20 // len(NOISE)
    assert fits < 12 and pictures.trim() == 12 - fits and pictures.trim() == 0
    assert [pictures.find(call) is not None for call in calls] == [number < fits - 1 or number == 11 for number in range(12)]
    draft = next(tmp_path.glob("??")) / ".x.tmp"
    draft.write_bytes(b"half")
    assert pictures.trim() == 0  # somebody may be writing it
    os.utime(draft, (0, 0))
    assert pictures.trim() == 1 and not draft.exists()
