"""A motion of the whole picture is read from its words and found in its pixels, whatever else only looks like it."""

from __future__ import annotations

import numpy as np
import pytest

from dreamlite_data.operators.exact import OPERATIONS
from dreamlite_data.operators.motion import ZOOMS, Motion, motion_correlation, said_motion
from dreamlite_data.operators.verify_cases import shuffled_blocks, truth_photos

MOTIONS = ("mirror", "flip", "turn", "upside_down", "zoom")


@pytest.mark.parametrize(("words", "motion"), [
    ("flip the picture horizontally", Motion("mirror", (1,))),
    ("mirror it along its horizontal axis", Motion("mirror", (0,))),
    ("rotate it 90 degrees counter-clockwise", Motion("turn", (1,))),
    ("rotate the photo by 90 degrees", Motion("turn", (-1, 1))),
    ("the picture was rotated 90 degrees to the left: undo that", Motion("turn", (-1,))),
    ("turn the picture upside down", Motion("turn", (2,))),
    ("zoom into the top left", Motion("zoom", ZOOMS, (0.0, 0.0))),
    ("crop to the middle of the picture and enlarge it to 200%", Motion("zoom", (2.0,), (0.5, 0.5))),
    ("zoom out", Motion("zoom", ZOOMS, out=True)),
    ("turn the cup into a mug", None), ("turn the lamp to the left", None), ("make it black and white", None),
    ("add a mirror on the wall", None),
])  # fmt: skip
def test_what_the_words_say(words: str, motion: Motion | None) -> None:
    assert said_motion(words) == motion


def test_every_exact_motion_is_said_by_its_words_and_no_other_operation_is() -> None:
    for name, operation in OPERATIONS.items():
        for words in filter(None, (operation.words, operation.inverse)):
            for _, text, _ in operation.forms(words, "a"):
                assert (said_motion(text) is not None) == (name in MOTIONS), text


@pytest.mark.parametrize("name", MOTIONS)
def test_a_picture_that_moved_correlates_and_one_that_was_shuffled_does_not(name: str) -> None:
    for image_id, photo in truth_photos(4, 5):
        operation = OPERATIONS[name]
        target = operation(photo, image_id)
        motion = said_motion(operation.forms(operation.words, image_id)[0][1])
        least = 0.75 if name == "zoom" else 0.85  # of verify_rules.yaml
        assert motion_correlation(motion, photo, shuffled_blocks(target, image_id)) < least < motion_correlation(motion, photo, target)
        if operation.inverse is not None:
            back = said_motion(operation.forms(operation.inverse, image_id)[0][1])
            assert motion_correlation(back, target, photo) > 0.99


def test_what_cannot_be_compared_is_none() -> None:
    wide = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    assert motion_correlation(Motion("turn", (1,)), wide, wide) is None
    assert motion_correlation(Motion("mirror", (1,)), np.full((40, 40, 3), 7, np.uint8), np.full((40, 40, 3), 9, np.uint8)) is None
    out = Motion("zoom", ZOOMS, out=True)
    photo = next(truth_photos(1, 0))[1]
    near = OPERATIONS["zoom"].apply(photo, {"zoom_percent": 200, "place": "middle"})
    assert motion_correlation(out, near, photo) > 0.8 > motion_correlation(out, near, photo[::-1])
