"""Words, scenes and texts are turned into measures; what nobody looked at is absent and what is not asked is not applicable."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dreamlite_data import scenes
from dreamlite_data.operators.exact import OPERATIONS
from dreamlite_data.operators.style import said_style, style_distance
from dreamlite_data.operators.verify_cases import truth_photos
from dreamlite_data.operators.verify_given import object_in_target, text_measures
from dreamlite_data.operators.wording import said_background_colour, said_destination, said_texts, said_thing_colour


@pytest.mark.parametrize(("words", "thing", "background", "goal"), [
    ("make the red star blue", "red", None, set()),
    ("make the star red", None, None, set()),
    ("paint the star in the middle of the picture red and keep its shape", None, None, set()),
    ("remove two of the three red stars", "red", None, set()),
    ("replace the cup with a red ball", None, None, set()),
    ("move the navy box to the top left corner", "navy", None, {"top", "left"}),
    ("the pink star is on the left now: move it to the middle of the picture", "pink", None, {"middle"}),
    ("make the background grey", None, "grey", set()),
    ("change the colour of the background to navy", None, "navy", set()),
    ("replace the background with a blue sky", None, None, set()),
])  # fmt: skip
def test_what_an_instruction_names(words: str, thing: str | None, background: str | None, goal: set[str]) -> None:
    assert (said_thing_colour(words), said_background_colour(words), said_destination(words)) == (thing, background, goal)


@pytest.mark.parametrize(("words", "before", "after"), [
    ('replace the word "SALE" with "OPEN"', "SALE", "OPEN"), ("change “Rue” to “Street” on the sign", "Rue", "Street"),
    ('"OPEN" should read "SHUT"', "OPEN", "SHUT"), ('remove the text "50%" from the poster', "50%", None),
    ('write "hello" on the wall', None, "hello"), ("make the text bolder", None, None),
])  # fmt: skip
def test_which_words_an_edit_of_text_quotes(words: str, before: str | None, after: str | None) -> None:
    assert said_texts(words) == (before, after)


def test_text_that_was_read() -> None:
    words = 'replace the word "sale now" with "open"'
    done = text_measures(words, ["SALE", "NOW!"], ["Open"], 0.10, 0.06)
    assert done == {"text_before": 1, "text_after": 1, "text_gone": 1, "text_growth": pytest.approx(-0.04), "text_unasked": 0}
    undone = text_measures(words, ["SALE", "NOW!"], ["SALE", "NOW!"], 0.10, 0.10)
    assert (undone["text_before"], undone["text_after"], undone["text_gone"]) == (1, 0, 0)
    added = text_measures('write "OPEN" on it', [], ["OPEN"], 0.0, 0.05)
    assert math.isnan(added["text_before"]) and math.isnan(added["text_gone"]) and added["text_after"] == 1
    assert set(text_measures(words, None, ["open"], None, 0.1).values()) == {None}
    assert text_measures('replace "OPEN" with "REOPENED"', ["OPEN"], ["REOPENED"], 0.1, 0.1)["text_gone"] == 1  # one holds the other


def test_words_that_nobody_asked_for_are_counted_and_misread_ones_are_not() -> None:
    remove = 'remove the word "SALE" from the sign'
    assert text_measures(remove, ["SALE", "Hotel"], ["Hote1"], 0.1, 0.05)["text_unasked"] == 0  # one letter is read otherwise
    assert text_measures(remove, ["SALE", "Hotel"], ["Hotel", "CAFE"], 0.1, 0.09)["text_unasked"] == 1
    assert text_measures(remove, ["SALE", "Grand Hotel"], ["Grandhotel", "x", "ox"], 0.1, 0.05)["text_unasked"] == 0
    assert text_measures('replace "SALE" with "GRAND OPENING"', ["SALE"], ["OPENING", "GRAND"], 0.1, 0.1)["text_unasked"] == 0


def test_the_reader_of_scenes_is_the_detector() -> None:
    rng = np.random.default_rng(3)
    scene = scenes.sample_scene(rng, 2)
    for kind in ("add", "remove", "replace", "move", "resize", "recolour"):
        edit = scenes.sample_edit(scene, rng, kind)
        words, done = scenes.instruction(edit, scene), scenes.apply_edit(scene, edit)
        found = [object_in_target(words, scene.to_json(), target.to_json()) for target in (done, scene)]
        assert found == ([0, 1] if kind == "remove" else [1, 0]), kind
    background = scenes.instruction(scenes.sample_edit(scene, rng, "background"), scene)
    assert math.isnan(object_in_target(background, scene.to_json(), scene.to_json()))
    assert object_in_target("add a cup", scene.to_json(), scene.to_json()) is None and object_in_target(words, scene.to_json(), None) is None


def test_a_style_is_near_to_itself_and_far_from_the_others() -> None:
    names = ("greyscale", "sepia", "negative", "posterise", "pixelate")
    assert [said_style(OPERATIONS[name].words.short[0]) for name in names] == list(names)
    assert said_style("add colours to this black and white photo") is None and said_style("paint the black and white cat red") is None
    image_id, photo = next(truth_photos(1, 3))
    for name in names:
        target = OPERATIONS[name](photo, image_id)
        assert style_distance(name, photo, target) < 1e-6 < 0.01 < min(style_distance(other, photo, target) for other in names if other != name)
