"""Agreement by attribute: an exact picture agrees in everything, and each wrong attribute is found and no other."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dreamlite_data import scenes
from dreamlite_data.scenes import Scene, SceneObject

ASKED = Scene((SceneObject("red", "circle", "large", "top left"), SceneObject("blue", "square", "small", "bottom right")), "white", "plain")


def shown(wanted: Scene, drawn: Scene) -> dict[str, list[bool]]:
    return scenes.scene_agreement(scenes.render(drawn), wanted)


def changed(**values: str) -> Scene:
    first, second = ASKED.objects
    return dataclasses.replace(ASKED, objects=(dataclasses.replace(first, **values), second))


@pytest.mark.parametrize(
    "attribute, value", [("colour", "green"), ("shape", "cross"), ("size", "small"), ("position", "bottom left")]
)
def test_one_wrong_attribute_is_the_only_one_that_fails(attribute: str, value: str) -> None:
    found = shown(ASKED, changed(**{attribute: value}))
    assert sorted(found.pop(attribute)) == [False, True]
    assert all(all(verdicts) for verdicts in found.values())
    assert all(all(verdicts) for verdicts in shown(ASKED, ASKED).values())  # the control


def test_binding_fails_where_colours_are_swapped_and_is_not_asked_where_a_colour_is_missing() -> None:
    first, second = ASKED.objects
    swapped = dataclasses.replace(
        ASKED, objects=(dataclasses.replace(first, colour="blue"), dataclasses.replace(second, colour="red"))
    )
    assert shown(ASKED, swapped)["binding"] == [False] and shown(ASKED, ASKED)["binding"] == [True]
    assert shown(ASKED, changed(colour="green"))["binding"] == []
    assert shown(dataclasses.replace(ASKED, objects=ASKED.objects[:1]), dataclasses.replace(ASKED, objects=ASKED.objects[:1]))["binding"] == []


def test_a_missing_object_fails_the_count_and_every_attribute_of_that_object() -> None:
    found = shown(ASKED, dataclasses.replace(ASKED, objects=ASKED.objects[:1]))
    assert found["count"] == [False] and [found[name] for name in ("colour", "shape", "size", "position")] == [[True, False]] * 4


def test_agreement_in_everything_is_the_exact_match_for_right_and_wrong_pictures() -> None:
    rng, seen = np.random.default_rng(12), []
    for _ in range(60):
        wanted = scenes.sample_scene(rng)
        edited = scenes.apply_edit(wanted, scenes.sample_edit(wanted, rng))
        for drawn in (wanted, edited, scenes.sample_scene(rng)):
            image = scenes.render(drawn)
            seen.append(all(all(verdicts) for verdicts in scenes.scene_agreement(image, wanted).values()))
            assert seen[-1] == scenes.matches(image, wanted)
    assert 60 <= sum(seen) < 120


def test_of_an_unreadable_picture_nothing_is_right() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not any(any(verdicts) for verdicts in scenes.scene_agreement(noise, ASKED).values())
    assert scenes.edit_agreement(ASKED, noise, changed(colour="green")) == {"followed": [False], "preserved": [False]}


def test_followed_and_preserved_together_are_the_exact_match_for_right_and_wrong_answers() -> None:
    rng = np.random.default_rng(11)
    seen = set()
    for index in range(160):
        source = scenes.sample_scene(rng, object_count=2)
        edit = scenes.sample_edit(source, rng, scenes.EDIT_KINDS[index % 8])
        target = scenes.apply_edit(source, edit)
        other = scenes.apply_edit(target, scenes.sample_edit(target, rng, "recolour"))
        for answer in (target, source, other, scenes.sample_scene(rng)):
            image = scenes.render(answer)
            found = scenes.edit_agreement(source, image, target)
            followed, preserved = found["followed"][0], found["preserved"][0]
            assert (followed and preserved) == scenes.edit_matches(source, image, target)
            seen.add((followed, preserved))
        assert scenes.edit_agreement(source, scenes.render(source), target) == {"followed": [False], "preserved": [True]}
    assert seen == {(True, True), (True, False), (False, True), (False, False)}
