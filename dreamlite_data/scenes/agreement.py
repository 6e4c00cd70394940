"""Where an image agrees with what was asked, attribute by attribute, as the verifier reads it: for breakdowns of an exact rate.
Of an image that cannot be read, nothing counts as right."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np

from dreamlite_data.scenes.scene import Scene, SceneObject
from dreamlite_data.scenes.verifier import misplaced, read_scene

ATTRIBUTES = ("colour", "shape", "size", "position")


def scene_agreement(image: np.ndarray, wanted: Scene) -> dict[str, list[bool]]:
    """`count`, `background` and `style`: one verdict; each of `ATTRIBUTES`: one for every wanted object, each against the drawn
    object that shares most with it. `binding`: whether colours and shapes stand on the right objects, a verdict only where the
    prompt has two objects or more that differ in both, and all its colours and all its shapes were drawn (the failure that
    GenEval, arXiv 2310.11513, calls attribute binding). All of it together is `matches`."""
    found = read_scene(image).scene
    if found is None:
        missed = {name: [False] * len(wanted.objects) for name in ATTRIBUTES}
        return {"count": [False], "background": [False], "style": [False], **missed, "binding": []}
    pairs = _assigned(wanted.objects, found.objects)
    return {
        "count": [len(found.objects) == len(wanted.objects)],
        "background": [found.background == wanted.background],
        "style": [found.style == wanted.style],
        **{name: [drawn is not None and getattr(drawn, name) == getattr(item, name) for item, drawn in pairs] for name in ATTRIBUTES},
        "binding": _binding(wanted, found),
    }


def edit_agreement(source: Scene, image: np.ndarray, target: Scene) -> dict[str, list[bool]]:
    """`followed`: what the instruction changes is there (and what it takes away is gone); `preserved`: all else is as it was and
    where it was, and nothing was added. Both together are `edit_matches`."""
    found = read_scene(image).scene
    if found is None:
        return {"followed": [False], "preserved": [False]}
    before, after, seen = ({item.key() for item in scene.objects} for scene in (source, target, found))
    made, gone = after - before, before - after
    followed = made <= seen and not gone & seen
    preserved = before & after <= seen <= after | gone and not misplaced(source, found, target)
    for name in ("background", "style"):
        right = getattr(found, name) == getattr(target, name)
        if getattr(source, name) == getattr(target, name):
            preserved = preserved and right
        else:
            followed = followed and right
    return {"followed": [followed], "preserved": [preserved]}


def _assigned(wanted: tuple[SceneObject, ...], drawn: tuple[SceneObject, ...]) -> list[tuple[SceneObject, SceneObject | None]]:
    """Each wanted object with a drawn one of its own, so that as many attributes as possible agree (at most three objects)."""
    padded = [*drawn, *[None] * max(0, len(wanted) - len(drawn))]
    best = max(
        itertools.permutations(padded, len(wanted)),
        key=lambda order: sum(_shared(item, other) for item, other in zip(wanted, order, strict=True)),
    )
    return list(zip(wanted, best, strict=True))


def _shared(item: SceneObject, other: SceneObject | None) -> int:
    return 0 if other is None else sum(getattr(item, name) == getattr(other, name) for name in ATTRIBUTES)


def _binding(wanted: Scene, found: Scene) -> list[bool]:
    colours, shapes, both = (
        tuple(Counter(key(item) for item in scene.objects) for scene in (wanted, found))
        for key in (lambda item: item.colour, lambda item: item.shape, lambda item: (item.colour, item.shape))
    )
    if min(len(colours[0]), len(shapes[0])) < 2 or colours[0] != colours[1] or shapes[0] != shapes[1]:
        return []
    return [both[0] == both[1]]
