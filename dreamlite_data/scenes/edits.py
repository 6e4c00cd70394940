"""Edits of the small world: eight kinds, each with its exact target scene and its instruction.
Untouched objects keep their jitter, so source and target differ only where the edit is."""

from __future__ import annotations

import dataclasses

import numpy as np

from dreamlite_data.scenes.language import object_phrase
from dreamlite_data.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    SceneObject,
    sample_object,
)

EDIT_KINDS = ("add", "remove", "recolour", "replace", "resize", "move", "background", "style")


@dataclasses.dataclass(frozen=True)
class Edit:
    """One edit: `before` is the object it touches (None for add, background, style), `after` what stands there then.
    `value` is the new background or style."""

    kind: str
    before: SceneObject | None = None
    after: SceneObject | None = None
    value: str | None = None


def sample_edit(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> Edit:
    """Draw an edit that `scene` allows; an explicit `kind` that it does not allow raises ValueError."""
    allowed = allowed_kinds(scene)
    if kind is None:
        kind = str(rng.choice(allowed))
    elif kind not in allowed:
        raise ValueError(f"the scene with {len(scene.objects)} objects allows no edit {kind!r}, only {allowed}")
    if kind == "background":
        return Edit(kind, value=str(rng.choice([name for name in BACKGROUNDS if name != scene.background])))
    if kind == "style":
        return Edit(kind, value=next(name for name in STYLES if name != scene.style))
    free = [name for name in POSITIONS if name not in {item.position for item in scene.objects}]
    while True:
        before = None if kind == "add" else scene.objects[int(rng.integers(len(scene.objects)))]
        after = _changed(kind, before, free, rng)
        edit = Edit(kind, before=before, after=after)
        names = [(item.colour, item.shape) for item in apply_edit(scene, edit).objects]
        if len(set(names)) == len(names):  # the target must stay nameable too
            return edit


def allowed_kinds(scene: Scene) -> list[str]:
    """The kinds that keep the scene at one to three objects."""
    count = len(scene.objects)
    return [kind for kind in EDIT_KINDS if not (kind == "add" and count == 3) and not (kind == "remove" and count == 1)]


def _changed(kind: str, before: SceneObject | None, free: list[str], rng: np.random.Generator) -> SceneObject | None:
    if kind == "add":
        return sample_object(rng, str(rng.choice(free)))
    if before is None or kind == "remove":
        return None
    if kind == "recolour":
        colour = str(rng.choice([name for name in COLOURS if name != before.colour]))
        return dataclasses.replace(before, colour=colour)
    if kind == "replace":
        return dataclasses.replace(before, shape=str(rng.choice([name for name in SHAPES if name != before.shape])))
    if kind == "resize":
        return dataclasses.replace(before, size=next(name for name in SIZES if name != before.size))
    return dataclasses.replace(before, position=str(rng.choice(free)))  # move


def apply_edit(scene: Scene, edit: Edit) -> Scene:
    """The exact target scene."""
    if edit.kind == "background":
        return dataclasses.replace(scene, background=str(edit.value))
    if edit.kind == "style":
        return dataclasses.replace(scene, style=str(edit.value))
    objects = [edit.after if item == edit.before else item for item in scene.objects]
    if edit.kind == "add":
        objects.append(edit.after)
    return dataclasses.replace(scene, objects=tuple(item for item in objects if item is not None))


def instruction(edit: Edit, scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The instruction as a plain imperative; `rng` picks one of two wordings (without it: the first)."""
    second = rng is not None and bool(rng.integers(2))
    name = f"the {edit.before.colour} {edit.before.shape}" if edit.before else ""
    after = edit.after
    if edit.kind == "add" and after:
        return f"put {object_phrase(after)}" if second else f"add {object_phrase(after)}"
    if edit.kind == "remove":
        return f"take away {name}" if second else f"remove {name}"
    if edit.kind == "recolour" and after:
        return f"make {name} {after.colour}" if second else f"change the colour of {name} to {after.colour}"
    if edit.kind == "replace" and after:
        return f"turn {name} into a {after.shape}" if second else f"replace {name} with a {after.shape}"
    if edit.kind == "resize" and after:
        return f"make {name} {after.size}" if second else f"change the size of {name} to {after.size}"
    if edit.kind == "move" and after:
        return f"put {name} at the {after.position}" if second else f"move {name} to the {after.position}"
    noun = "colour" if edit.kind == "background" else "style"
    if second:
        return f"make the background {edit.value}"
    return f"change the {noun} of the background to {edit.value}"


def describe_difference(source: Scene, target: Scene) -> str | None:
    """Name the one edit that leads from `source` to `target` (first wording); None where no single edit does."""
    for edit in _single_edits(source, target):
        if apply_edit(source, edit).key() == target.key():
            return instruction(edit, source)
    return None


def _single_edits(source: Scene, target: Scene) -> list[Edit]:
    if source.background != target.background:
        return [Edit("background", value=target.background)]
    if source.style != target.style:
        return [Edit("style", value=target.style)]
    gone = [item for item in source.objects if item.key() not in {other.key() for other in target.objects}]
    come = [item for item in target.objects if item.key() not in {other.key() for other in source.objects}]
    if not gone and len(come) == 1:
        return [Edit("add", after=come[0])]
    if len(gone) == 1 and not come:
        return [Edit("remove", before=gone[0])]
    if len(gone) == 1 and len(come) == 1:
        fields = {"recolour": "colour", "replace": "shape", "resize": "size", "move": "position"}
        return [
            Edit(kind, before=gone[0], after=dataclasses.replace(gone[0], **{field: getattr(come[0], field)}))
            for kind, field in fields.items()
            if getattr(gone[0], field) != getattr(come[0], field)
        ]
    return []
