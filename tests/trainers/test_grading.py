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


def test_answers_name_their_question_and_what_is_wrong_with_them() -> None:
    images = np.concatenate([drawn(ASKED.targets), drawn(ASKED.sources)])
    rows = grade_edited(images, ASKED).answers(rewards=list(range(16)))
    assert [row["question_id"] for row in rows] == 2 * [f"3-8-{place}" for place in range(8)]
    assert [row["repetition"] for row in rows] == [0] * 8 + [1] * 8 and [row["text"] for row in rows] == 2 * ASKED.instructions
    assert [row["wrong"] for row in rows] == [[]] * 8 + [["followed"]] * 8 and [row["exact"] for row in rows] == [True] * 8 + [False] * 8
    assert [row["reward"] for row in rows] == list(range(16))
    wider, elsewhere = draw_questions(9, 3), draw_questions(8, 4)
    assert len({asked.name for asked in (ASKED, wider, elsewhere)}) == 3  # other edits are drawn, so they must not be paired
    assert (ASKED.prompts == wider.prompts[:8], ASKED.instructions == wider.instructions[:8]) != (True, True)


def test_parts_and_kinds_of_edits_add_up() -> None:
    grades = grade_edited(drawn(ASKED.sources), ASKED)
    found = {row["metric"]: row["value"] for row in grades.rows()}
    assert found["edit_exact"] == found["edit_part_followed"] == 0.0 and found["edit_part_preserved"] == 1.0
    kinds = [row for row in grades.rows() if row["metric"].startswith("edit_exact_")]
    assert {row["metric"] for row in kinds} == {f"edit_exact_{kind}" for kind in scenes.EDIT_KINDS} and sum(row["n"] for row in kinds) == 8
