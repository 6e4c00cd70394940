"""Captions of the small world: a grammar that writes a scene in words and reads the words back.
Two sentence forms and a free order of objects keep a caption from being a fixed code."""

from __future__ import annotations

import re

import numpy as np

from dreamlite_data.scenes.scene import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, STYLES, Scene, SceneObject


def object_phrase(item: SceneObject) -> str:
    """One object in words, e.g. "a large red circle at the top left"."""
    return f"a {item.size} {item.colour} {item.shape} at the {item.position}"


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Describe `scene`; `rng` picks the sentence form and the order of objects (without it: first form, as stored)."""
    objects = list(scene.objects)
    form = 0
    if rng is not None:
        objects = [objects[index] for index in rng.permutation(len(objects))]
        form = int(rng.integers(2))
    phrases = [object_phrase(item) for item in objects]
    listing = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    if form == 0:
        return f"{listing} on a {scene.style} {scene.background} background"
    return f"a {scene.style} {scene.background} background with {listing}"


def _one_of(words: object) -> str:
    return "(" + "|".join(sorted(words, key=len, reverse=True)) + ")"  # type: ignore[call-overload]


_OBJECT = re.compile(
    rf"a {_one_of(SIZES)} {_one_of(COLOURS)} {_one_of(SHAPES)} at the {_one_of(POSITIONS)}(?= |,|$)"
)
_BACKGROUND = re.compile(rf"a {_one_of(STYLES)} {_one_of(BACKGROUNDS)} background")


def parse_caption(text: str) -> Scene | None:
    """Read a caption back into a scene without jitter; None where the text is not of this grammar."""
    backgrounds = _BACKGROUND.findall(text)
    objects = tuple(
        SceneObject(size=size, colour=colour, shape=shape, position=position)
        for size, colour, shape, position in _OBJECT.findall(text)
    )
    if len(backgrounds) != 1 or not 1 <= len(objects) <= 3:
        return None
    if len({item.position for item in objects}) < len(objects):
        return None
    # Every word must belong to the grammar: leftovers mean that the text says more than was read.
    rest = _BACKGROUND.sub("", _OBJECT.sub("", text))
    if re.sub(r"\b(on|and|with)\b|[,\s]", "", rest):
        return None
    style, background = backgrounds[0]
    return Scene(objects=objects, background=background, style=style)
