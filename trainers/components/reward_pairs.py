"""Preference data of the small world: images beside right and wrong words, each with the count of what is wrong.
Because the scene is known, every pair and every word carries its label, which is what lets a reward learn in minutes."""

from __future__ import annotations

import dataclasses
import re
import zlib

import numpy as np
from scipy import ndimage

from dreamlite_data import scenes
from dreamlite_data.scenes.render import coverage
from trainers.components.classes import IGNORE

COLOURS, SHAPES, SIZES = list(scenes.COLOURS), list(scenes.SHAPES), list(scenes.SIZES)
BACKGROUNDS, STYLES, POSITIONS = list(scenes.BACKGROUNDS), list(scenes.STYLES), list(scenes.POSITIONS)
DEGRADATIONS = ("blur", "noise", "washed", "ghost", "patches", "mixture")
VARIANTS = ("recolour", "replace", "resize", "move", "add", "remove", "background", "style", "other")
HELD_OUT_SHARE = 10

PHRASE_END = re.compile(rf"\bat the ({'|'.join(sorted(POSITIONS, key=len, reverse=True))})(?= |,|$)")
BACKGROUND_END = re.compile(r"\bbackground\b")


def held_out(scene: scenes.Scene) -> bool:
    """True for one scene in ten, by its key: training never draws it and measurement draws nothing else."""
    return zlib.crc32(repr(scene.key()).encode()) % HELD_OUT_SHARE == 0


def draw_scene(rng: np.random.Generator, *, measured: bool) -> scenes.Scene:
    """A scene from the training side or, with `measured`, from the held-out side."""
    while True:
        scene = scenes.sample_scene(rng)
        if held_out(scene) == measured:
            return scene


def vary(scene: scenes.Scene, rng: np.random.Generator, kind: str | None = None) -> tuple[scenes.Scene, str]:
    """A scene that differs in one thing (`kind` of VARIANTS, drawn where None) and the kind that was possible."""
    if kind is None:
        kind = str(rng.choice([*VARIANTS, "move", "move"]))  # places are learned last
    if kind == "other":
        return scenes.sample_scene(rng), kind
    if kind == "add" and len(scene.objects) == 3:
        kind = "remove"
    if kind == "remove" and len(scene.objects) == 1:
        kind = "add"
    return scenes.apply_edit(scene, scenes.sample_edit(scene, rng, kind)), kind


def scramble(scene: scenes.Scene, rng: np.random.Generator) -> scenes.Scene:
    """The same cells filled with partly other things: words from which nothing about the image can be copied."""
    other = scenes.sample_scene(rng, len(scene.objects))
    objects = []
    for item, new in zip(scene.objects, other.objects, strict=True):
        names = [name for name in ("colour", "shape", "size") if rng.random() < 0.6]
        objects.append(dataclasses.replace(item, **{name: getattr(new, name) for name in names}))
    if rng.random() < 0.5:  # an image says where things are in one way, words in nine: place is learned last
        objects[0] = dataclasses.replace(objects[0], position=str(rng.choice(free_cells(scene))))
    background, style = (other.background, other.style) if rng.random() < 0.3 else (scene.background, scene.style)
    return scenes.Scene(tuple(objects), background, style)


def free_cells(scene: scenes.Scene) -> list[str]:
    """Positions where nothing stands."""
    return [name for name in POSITIONS if name not in {item.position for item in scene.objects}]


def cells(scene: scenes.Scene) -> np.ndarray:
    """int64 [9, 3]: colour, shape, size of each cell, 0 where empty and 1.. as in the lists above."""
    found = np.zeros((len(POSITIONS), 3), np.int64)
    for item in scene.objects:
        row = POSITIONS.index(item.position)
        found[row] = (1 + COLOURS.index(item.colour), 1 + SHAPES.index(item.shape), 1 + SIZES.index(item.size))
    return found


def mistakes(shown: scenes.Scene, said: scenes.Scene) -> int:
    """How many statements of `said` the image of `shown` breaks: each wrong attribute, missing or extra object."""
    wrong = int((cells(shown) != cells(said)).sum())
    return wrong + 2 * (shown.background != said.background) + 2 * (shown.style != said.style)


def token_labels(scene: scenes.Scene) -> np.ndarray:
    """int64 [9, 4]: colour, shape, size and cell (0: none) of the object on each visual token."""
    table = cells(scene)
    place = np.where(table[:, :1] > 0, 1 + np.arange(len(POSITIONS))[:, None], 0)
    return np.concatenate([table, place], axis=1)


def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a good decoder does to a clean image: slight blur, noise, colour cast. float32 [64, 64, 3] in 0..255."""
    image = image.astype(np.float32)
    if rng.random() < 0.5:
        image = ndimage.gaussian_filter(image, (rng.uniform(0.2, 0.7),) * 2 + (0,))
    if rng.random() < 0.5:
        image = image * rng.uniform(0.94, 1.04, 3).astype(np.float32) + rng.uniform(-6, 6, 3).astype(np.float32)
    if rng.random() < 0.5:
        image = image + rng.standard_normal(image.shape, np.float32) * rng.uniform(1, 6)
    return np.clip(image, 0, 255)


def degrade(image: np.ndarray, rng: np.random.Generator, kind: str) -> np.ndarray:
    """Spoil an image in one of the ways a half-trained model does. float32 [64, 64, 3] in 0..255."""
    image = image.astype(np.float32)
    if kind == "blur":
        image = ndimage.gaussian_filter(image, (rng.uniform(1.4, 3.5),) * 2 + (0,))
    elif kind == "noise":
        rough = rng.standard_normal(image.shape, np.float32)
        smooth = ndimage.gaussian_filter(rough, (rng.uniform(0, 2),) * 2 + (0,))
        image = image + smooth / smooth.std() * rng.uniform(18, 55)
    elif kind == "washed":
        grey = image.mean((0, 1)) if rng.random() < 0.5 else np.float32(rng.uniform(60, 200))
        image = image + (grey - image) * rng.uniform(0.35, 0.7)
    elif kind in ("ghost", "mixture"):
        other = scenes.render(scenes.sample_scene(rng)).astype(np.float32)
        if kind == "mixture":
            image = image + (other - image) * rng.uniform(0.25, 0.5)
        else:
            centre = rng.uniform(8, 56, 2)
            shape = str(rng.choice(SHAPES))
            alpha = coverage(shape, rng.uniform(5, 10), *centre, image.shape[0])[..., None]
            colour = np.asarray(scenes.COLOURS[str(rng.choice(COLOURS))], np.float32)
            alpha = ndimage.gaussian_filter(alpha, (rng.uniform(0, 1.5),) * 2 + (0,))
            image = image + alpha * rng.uniform(0.35, 0.8) * (colour - image)
    else:  # patches
        size = int(rng.choice([4, 8, 16]))
        for _ in range(int(rng.integers(3, 9)) * (1 if size == 16 else 2)):
            (y, x), (v, u) = rng.integers(0, 64 // size, (2, 2)) * size
            image[y : y + size, x : x + size] = np.roll(image, (y - v, x - u), (0, 1))[y : y + size, x : x + size]
    return np.clip(image, 0, 255)


@dataclasses.dataclass
class Picture:
    """One image of a batch: pixels float32 in 0..255, the scene behind it, and how it was spoilt (0: it was not)."""

    pixels: np.ndarray
    scene: scenes.Scene
    fault: int

    @classmethod
    def of(cls, scene: scenes.Scene, rng: np.random.Generator, fault: str | None = None) -> Picture:
        pixels = scenes.render(scene)
        if fault is not None:
            pixels = degrade(pixels, rng, fault)
        return cls(augment(pixels, rng), scene, 0 if fault is None else 1 + DEGRADATIONS.index(fault))


@dataclasses.dataclass
class Row:
    """One sequence of a batch: the pictures it shows and the prompts it scores, each with its labels.

    `wrong[b]`: mistakes counted for branch b; `head[b]`: which head judges it; pairs form within one `group`.
    `sites[b]`: (character where a statement ends, labels by name) of each statement in branch b's prompt.
    `verdict[b]`: labels to be read at branch b's reward token.
    """

    pictures: tuple[int, ...]
    prompts: list[str]
    head: list[int]
    wrong: list[int]
    group: int
    fault: int
    sites: list[list[tuple[int, dict[str, int]]]]
    verdict: list[dict[str, int]]


def caption_sites(text: str, shown: scenes.Scene) -> list[tuple[int, dict[str, int]]]:
    """Where each statement of a caption ends and what the image truly shows there."""
    table = cells(shown)
    found = [
        (match.end(), dict(zip(("colour", "shape", "size"), map(int, table[POSITIONS.index(match[1])]), strict=True)))
        for match in PHRASE_END.finditer(text)
    ]
    labels = {"background": BACKGROUNDS.index(shown.background), "style": STYLES.index(shown.style)}
    return found + [(match.end(), labels) for match in BACKGROUND_END.finditer(text)]


def caption_verdict(shown: scenes.Scene, said: scenes.Scene, fault: int) -> dict[str, int]:
    """What is wrong with a caption, as classes: wrong cells (0 to 3 and more), background, style, fault."""
    cell_faults = int((cells(shown) != cells(said)).any(1).sum())
    return {
        "wrong_cells": min(cell_faults, 3) if not fault else IGNORE,
        "wrong_background": int(shown.background != said.background) if not fault else IGNORE,
        "wrong_style": int(shown.style != said.style) if not fault else IGNORE,
        "fault": fault,
    }


def generate_batch(groups: int, rng: np.random.Generator) -> tuple[list[Picture], list[Row]]:
    """Two images a group (a scene and its variant, or the scene spoilt), both under the same three captions."""
    pictures: list[Picture] = []
    rows: list[Row] = []
    for group in range(groups):
        first = draw_scene(rng, measured=False)
        second, _ = vary(first, rng)
        if rng.random() < 0.3:
            shown = [Picture.of(first, rng), Picture.of(first, rng, str(rng.choice(DEGRADATIONS)))]
        else:
            shown = [Picture.of(first, rng), Picture.of(second, rng)]
        said = [first, second, scramble(second if rng.random() < 0.5 else first, rng)]
        texts = [scenes.caption(scene, rng) for scene in said]
        for picture in shown:
            rows.append(
                Row(
                    pictures=(len(pictures),),
                    prompts=texts,
                    head=[0] * len(said),
                    wrong=[mistakes(picture.scene, scene) for scene in said],
                    group=group,
                    fault=picture.fault,
                    sites=[[] if picture.fault else caption_sites(text, picture.scene) for text in texts],
                    verdict=[caption_verdict(picture.scene, scene, picture.fault) for scene in said],
                )
            )
            pictures.append(picture)
    return pictures, rows


def edit_mistakes(source: scenes.Scene, edit: scenes.Edit, shown: scenes.Scene) -> tuple[int, int]:
    """(mistakes in what the instruction asks for, mistakes in what it leaves alone) of `shown` as an edit of `source`."""
    wanted = scenes.apply_edit(source, edit)
    total = mistakes(shown, wanted)
    if edit.kind == "background":
        asked = 2 * (shown.background != wanted.background)
    elif edit.kind == "style":
        asked = 2 * (shown.style != wanted.style)
    else:
        was, want, have = cells(source), cells(wanted), cells(shown)
        asked = int(((want != have) & (was != want)).sum())
    return int(asked), int(total - asked)


def edit_places(edit: scenes.Edit) -> tuple[int, int]:
    """Cells the edit is about, counted from 1 (0: the background): where the object stood and where it stands then."""
    before = edit.before or edit.after
    after = edit.after or edit.before
    if before is None or after is None:
        return 0, 0
    return 1 + POSITIONS.index(before.position), 1 + POSITIONS.index(after.position)


def edit_site(source: scenes.Scene, edit: scenes.Edit, shown: scenes.Scene) -> dict[str, int]:
    """What an instruction's last word should know: the places it means and what stands there now and stood before."""
    first, second = edit_places(edit)
    labels = {"place": first, "target_place": second}
    labels["background"], labels["style"] = BACKGROUNDS.index(shown.background), STYLES.index(shown.style)
    labels["background_before"] = BACKGROUNDS.index(source.background)
    labels["style_before"] = STYLES.index(source.style)
    if first:
        before, after = cells(source)[first - 1], cells(shown)[second - 1]
        for index, name in enumerate(("colour", "shape", "size")):
            labels[f"{name}_before"], labels[name] = int(before[index]), int(after[index])
    return labels


CANDIDATES = {"no_op": 0.15, "wrong_object": 0.25, "wrong_value": 0.2, "other_scene": 0.05, "extra_change": 0.2, "spoilt": 0.15}
"""Wrong targets and how often training draws each: those that are told apart last are shown most."""


def wrong_candidate(
    source: scenes.Scene, edit: scenes.Edit, rng: np.random.Generator, kind: str
) -> tuple[scenes.Scene, scenes.Edit | None, str]:
    """A wrong target of `kind` (CANDIDATES without `spoilt`): its scene, the edit that it would be right for (None where
    there is none) and the kind that was possible."""
    target = scenes.apply_edit(source, edit)
    if kind in ("wrong_object", "wrong_value"):
        for _ in range(8):
            try:
                other = scenes.sample_edit(source, rng, edit.kind)
            except ValueError:
                break
            same_object = other.before == edit.before
            if scenes.apply_edit(source, other).key() != target.key() and same_object == (kind == "wrong_value"):
                return scenes.apply_edit(source, other), other, kind
        other = scenes.sample_edit(source, rng)
        if scenes.apply_edit(source, other).key() != target.key():
            return scenes.apply_edit(source, other), other, "wrong_edit"
        kind = "no_op"
    if kind == "other_scene":
        return scenes.sample_scene(rng), None, kind
    if kind == "extra_change":
        changed = scenes.apply_edit(target, scenes.sample_edit(target, rng))
        if sum(edit_mistakes(source, edit, changed)) and not edit_mistakes(source, edit, changed)[0]:
            return changed, None, kind
        kind = "no_op"
    return source, None, kind


def edit_batch(groups: int, rng: np.random.Generator) -> tuple[list[Picture], list[Row]]:
    """A source, its right target and a wrong one a group, each target under two instructions; both heads judge."""
    pictures: list[Picture] = []
    rows: list[Row] = []
    for group in range(groups):
        source = draw_scene(rng, measured=False)
        edit = scenes.sample_edit(source, rng)
        other = scenes.sample_edit(source, rng)
        target = scenes.apply_edit(source, edit)
        kind = str(rng.choice(list(CANDIDATES), p=list(CANDIDATES.values())))
        if kind == "spoilt":
            wrong = Picture.of(target, rng, str(rng.choice(DEGRADATIONS)))
        else:
            scene, fitting, _ = wrong_candidate(source, edit, rng, kind)
            other = fitting or other
            wrong = Picture.of(scene, rng)
        base = len(pictures)
        pictures += [Picture.of(source, rng), Picture.of(target, rng), wrong]
        asked = [(each, scenes.instruction(each, source, rng)) for each in (edit, other)]
        rows += [
            edit_row((base, base + index), source, each, text, pictures[base + index], group)
            for index in (1, 2)
            for each, text in asked
        ]
    return pictures, rows


def edit_row(
    pictures: tuple[int, int], source: scenes.Scene, edit: scenes.Edit, text: str, shown: Picture, group: int
) -> Row:
    """One source, one candidate, one instruction, judged by both heads."""
    asked, rest = edit_mistakes(source, edit, shown.scene)
    site = {} if shown.fault else edit_site(source, edit, shown.scene)
    known = not shown.fault
    return Row(
        pictures=pictures,
        prompts=[text, text],
        head=[0, 1],
        wrong=[asked, rest],
        group=group,
        fault=shown.fault,
        sites=[[(len(text), site)], [(len(text), site)]],
        verdict=[
            {"asked": min(asked, 2) if known else IGNORE, "rest": IGNORE, "fault": IGNORE},
            {"asked": IGNORE, "rest": min(rest, 3) if known else IGNORE, "fault": shown.fault},
        ],
    )
