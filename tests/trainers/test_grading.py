"""Rates of answers: repetitions keep their questions, intervals count questions, and a broken picture costs what it should."""

from __future__ import annotations

import numpy as np

from dreamlite_data import scenes
from dreamlite_data.shares import Share
from trainers.grading import grade_edited, grade_generated
from trainers.questions import draw_questions

ASKED = draw_questions(8, 3)


def drawn(wanted: list[scenes.Scene]) -> np.ndarray:
    return np.stack([scenes.render(scene) for scene in wanted])


def test_repetitions_are_graded_against_their_own_questions_and_do_not_narrow_the_interval() -> None:
    images = np.concatenate([drawn(ASKED.wanted), drawn(ASKED.wanted)])
    images[8:12] = 0  # the second answer to the first four questions
    row = grade_generated(images, ASKED).rows()[0]
    assert (row["value"], row["n"]) == (0.75, 16)
    assert (row["low"], row["high"]) == Share(6, 8).interval
    shuffled = np.concatenate([images[:8], images[:8][::-1]])  # the control: the right pictures under the wrong prompts
    assert grade_generated(shuffled, ASKED).rows()[0]["value"] < 0.7


def test_parts_and_kinds_of_edits_add_up() -> None:
    grades = grade_edited(drawn(ASKED.sources), ASKED)
    found = {row["metric"]: row["value"] for row in grades.rows()}
    assert found["edit_exact"] == found["edit_part_followed"] == 0.0 and found["edit_part_preserved"] == 1.0
    kinds = [row for row in grades.rows() if row["metric"].startswith("edit_exact_")]
    assert {row["metric"] for row in kinds} == {f"edit_exact_{kind}" for kind in scenes.EDIT_KINDS} and sum(row["n"] for row in kinds) == 8
