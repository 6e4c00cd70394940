"""Read an edit instruction of the small world back into the edit it asks for.
Both wordings of every kind are known, and an object that the scene does not have is said to be missing."""

from __future__ import annotations

import dataclasses
import re

from dreamlite_data.scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, STYLES, Edit, Scene, SceneObject, apply_edit


def _one_of(name: str, words: object) -> str:
    return f"(?P<{name}>{'|'.join(sorted(words, key=len, reverse=True))})"  # type: ignore[call-overload]


_NAME = f"the {_one_of('colour', COLOURS)} {_one_of('shape', SHAPES)}"
_NEW = f"a {_one_of('size', SIZES)} {_one_of('colour', COLOURS)} {_one_of('shape', SHAPES)} at the {_one_of('position', POSITIONS)}"
_TO_COLOUR = _one_of("to", COLOURS)
_TO_SIZE = _one_of("to", SIZES)
_TO_SHAPE = _one_of("to", SHAPES)
_TO_PLACE = _one_of("to", POSITIONS)

_FORMS: tuple[tuple[str, str | None, str], ...] = (
    ("add", None, f"(?:add|put) {_NEW}"),
    ("remove", None, f"(?:remove|take away) {_NAME}"),
    ("recolour", "colour", f"change the colour of {_NAME} to {_TO_COLOUR}"),
    ("recolour", "colour", f"make {_NAME} {_TO_COLOUR}"),
    ("replace", "shape", f"replace {_NAME} with a {_TO_SHAPE}"),
    ("replace", "shape", f"turn {_NAME} into a {_TO_SHAPE}"),
    ("resize", "size", f"change the size of {_NAME} to {_TO_SIZE}"),
    ("resize", "size", f"make {_NAME} {_TO_SIZE}"),
    ("move", "position", f"move {_NAME} to the {_TO_PLACE}"),
    ("move", "position", f"put {_NAME} at the {_TO_PLACE}"),
    ("background", None, f"(?:change the colour of the background to|make the background) {_one_of('to', BACKGROUNDS)}"),
    ("style", None, f"(?:change the style of the background to|make the background) {_one_of('to', STYLES)}"),
)
"""Kind, the field of the object that changes, and the words; exactly one form fits an instruction."""

JOINT = ", then "
"""Stands between the steps of a composed instruction."""
MOST_STEPS = 4

_PATTERNS = [(kind, field, re.compile(form)) for kind, field, form in _FORMS]


def parse_instruction(text: str, scene: Scene | None) -> tuple[Edit | None, str]:
    """The edit that `text` asks for in `scene`, and '' ; or None and why: 'unknown' where the words are of no known form,
    else a sentence (the object is not there, or no scene was read from the source)."""
    fitting = ((kind, field, match) for kind, field, form in _PATTERNS if (match := form.fullmatch(text)))
    kind, field, match = next(fitting, (None, None, None))
    if kind is None or match is None:
        return None, "unknown"
    if scene is None:
        return None, "no scene was read from the source"
    words = match.groupdict()
    if kind in ("background", "style"):
        return Edit(kind, value=words["to"]), ""
    if kind == "add":
        item = SceneObject(words["colour"], words["shape"], words["size"], words["position"])
        if item.position in {other.position for other in scene.objects} or len(scene.objects) >= 3:
            return None, f"there is no room for another object at the {item.position}"
        return Edit(kind, after=item), ""
    named = [item for item in scene.objects if (item.colour, item.shape) == (words["colour"], words["shape"])]
    if len(named) != 1:
        return None, f"the source shows {len(named)} objects called {words['colour']} {words['shape']}"
    if kind == "remove":
        return Edit(kind, before=named[0]), ""
    return Edit(kind, before=named[0], after=dataclasses.replace(named[0], **{str(field): words["to"]})), ""


def parse_steps(text: str, scene: Scene | None) -> tuple[list[Edit] | None, str]:
    """The edits that a composed instruction ("remove the red circle, then make the background white") asks for, one after
    the other; a plain instruction is one step. None and why as in `parse_instruction`."""
    steps: list[Edit] = []
    here = scene
    parts = text.split(JOINT)
    for part in parts if len(parts) <= MOST_STEPS else [text]:
        edit, reason = parse_instruction(part, here)
        if edit is None:
            return None, reason
        steps.append(edit)
        here = apply_steps(here, [edit]) if here is not None else None
    return steps, ""


def apply_steps(scene: Scene, steps: list[Edit]) -> Scene:
    """The scene after all steps."""
    for edit in steps:
        scene = apply_edit(scene, edit)
    return scene
