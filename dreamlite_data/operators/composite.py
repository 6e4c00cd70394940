"""Edits of photos by pasting cut-outs: add, remove, replace, move, resize, recolour, count, each with its exact mask and inverse.
Everything is drawn from (image id, cut-out ids, operation), so the same photo always gets the same edits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from PIL import Image

from dreamlite_data.operators.change import LEAST_CHANGE, LUMA, Pixels, changed_pixels
from dreamlite_data.operators.cutouts import CutOut, CutOutError, CutOutFolder, CutOuts, DrawnCutOuts
from dreamlite_data.operators.draw import draw_bits, generator, pick, shuffled
from dreamlite_data.operators.edit import Form, Request, Try, said
from dreamlite_data.operators.wording import COLOURS, NUMBERS, draw_colour, plural, with_article

CELLS = (
    "in the top left corner", "at the top", "in the top right corner",
    "on the left", "in the middle", "on the right",
    "in the bottom left corner", "at the bottom", "in the bottom right corner",
)  # fmt: skip
TOWARDS = (
    "to the top left corner", "to the top", "to the top right corner",
    "to the left", "to the middle", "to the right",
    "to the bottom left corner", "to the bottom", "to the bottom right corner",
)  # fmt: skip
NORMAL, SMALL, LARGE = 0.8, 0.5, 0.95
"""Longer side of a pasted thing as a share of its cell: things in different cells never touch."""
JITTER = 0.05  # of a cell; with LARGE it still stays inside
COMPANION_SHARE = 0.5
"""How often a second thing lies in the picture that the edit must leave alone."""


@dataclasses.dataclass(frozen=True)
class Pasted:
    """A thing in the picture: `cell` of the 3 x 3, `size` as above, `tint` a colour it was recoloured to, `shift` its
    distance from the cell's centre in cells."""

    item: CutOut
    cell: int
    size: float = NORMAL
    tint: str | None = None
    shift: tuple[float, float] = (0.0, 0.0)

    @property
    def name(self) -> str:
        """Noun phrase with the colour that it shows."""
        colour = self.tint or self.item.colour
        return f"{colour} {self.item.noun}" if colour else self.item.noun


@dataclasses.dataclass(frozen=True)
class Composition:
    """An edit as two lists of things on one photo, and the words for both directions (None: no words for the way back)."""

    operation: str
    before: tuple[Pasted, ...]
    after: tuple[Pasted, ...]
    forms: tuple[Form, ...]
    inverse_operation: str
    inverse_forms: tuple[Form, ...] | None

    @property
    def changed(self) -> tuple[Pasted, ...]:
        """The things that are in one of the pictures only."""
        return tuple(item for item in (*self.before, *self.after) if not (item in self.before and item in self.after))


# --- pictures --------------------------------------------------------------------------------------------------------


def paste(photo: Pixels, things: Iterable[Pasted], cutouts: CutOuts) -> Pixels:
    """`photo` with the things laid on it."""
    picture = photo.astype(np.float32)
    for thing in things:
        window, layer = _placed(thing, photo.shape, cutouts)
        alpha = layer[..., 3:] / 255
        picture[window] += alpha * (layer[..., :3] - picture[window])
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def covered(shape: tuple[int, ...], things: Iterable[Pasted], cutouts: CutOuts) -> np.ndarray:
    """bool [H, W]: where any of the things lies, down to its faintest edge. Nothing outside differs by a single level."""
    mask = np.zeros(shape[:2], dtype=bool)
    for thing in things:
        window, layer = _placed(thing, shape, cutouts)
        mask[window] |= layer[..., 3] > 0
    return mask


def _placed(thing: Pasted, shape: tuple[int, ...], cutouts: CutOuts) -> tuple[tuple[slice, slice], np.ndarray]:
    """Where the thing lies in a picture of `shape`, and its straight RGBA there as float32."""
    height, width = shape[:2]
    cell_height, cell_width = height / 3, width / 3
    pixels = cutouts.pixels(thing.item)
    if thing.tint is not None:
        pixels = recoloured(pixels, thing.tint)
    scale = thing.size * min(cell_height, cell_width) / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    # Pillow resizes RGBA with the colour weighted by alpha, so that no dark rim creeps in from transparent pixels.
    layer = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    row, column = divmod(thing.cell, 3)
    top = round((row + 0.5 + thing.shift[1]) * cell_height - layer.shape[0] / 2)
    left = round((column + 0.5 + thing.shift[0]) * cell_width - layer.shape[1] / 2)
    top, left = (int(np.clip(start, 0, limit - length)) for start, limit, length in ((top, height, layer.shape[0]), (left, width, layer.shape[1])))
    return (slice(top, top + layer.shape[0]), slice(left, left + layer.shape[1])), layer


def recoloured(pixels: np.ndarray, colour: str) -> np.ndarray:
    """RGBA pixels in the shades of `colour`: what was of middle brightness becomes the colour itself, darker parts darker and
    lighter parts lighter, so that the thing keeps its modelling."""
    luma = pixels[..., :3].astype(np.float32) @ LUMA / 255
    weight = pixels[..., 3].astype(np.float32)
    middle = float(np.clip((luma * weight).sum() / max(1.0, weight.sum()), 0.15, 0.85))
    wanted = np.array(COLOURS[colour], np.float32)
    darker = wanted * (luma / middle)[..., None]
    lighter = wanted + (255 - wanted) * (0.6 * (luma - middle) / (1 - middle))[..., None]
    shaded = np.where((luma < middle)[..., None], darker, lighter)
    return np.dstack([np.clip(np.rint(shaded), 0, 255).astype(np.uint8), pixels[..., 3]])


# --- words -----------------------------------------------------------------------------------------------------------


def _forms(operation: str, short: tuple[str, ...], long: tuple[str, ...]) -> tuple[Form, ...]:
    return tuple(
        Form(form, text, f"composite/{operation}/{form}/{index}")
        for form, texts in (("short", short), ("long", long))
        for index, text in enumerate(texts)
    )


def add_forms(name: str, cell: int) -> tuple[Form, ...]:
    """Words for adding a thing."""
    what, where = with_article(name), CELLS[cell]
    return _forms("add", (f"add {what} {where}", f"put {what} {where}"),
                  (f"add {what} {where} of the picture and leave everything else as it is",))  # fmt: skip


def remove_forms(name: str, cell: int) -> tuple[Form, ...]:
    """Words for removing a thing."""
    return _forms("remove", (f"remove the {name}", f"take the {name} away"),
                  (f"remove the {name} {CELLS[cell]} of the picture and show what is behind it",))  # fmt: skip


def replace_forms(name: str, other: str, cell: int) -> tuple[Form, ...]:
    """Words for replacing a thing by another."""
    return _forms("replace", (f"replace the {name} with {with_article(other)}", f"turn the {name} into {with_article(other)}"),
                  (f"replace the {name} {CELLS[cell]} of the picture with {with_article(other)} of about the same size",))  # fmt: skip


def move_forms(name: str, cell: int, other: int) -> tuple[Form, ...]:
    """Words for moving a thing."""
    return _forms("move", (f"move the {name} {TOWARDS[other]}", f"shift the {name} {TOWARDS[other]}"),
                  (f"the {name} is {CELLS[cell]} now: move it {TOWARDS[other]} of the picture without changing its size",))  # fmt: skip


def resize_forms(name: str, grow: bool, cell: int) -> tuple[Form, ...]:
    """Words for making a thing about twice or half as large."""
    word, times = ("bigger", "about twice") if grow else ("smaller", "about half")
    return _forms("resize", (f"make the {name} {word}", f"the {name} should be {word}"),
                  (f"make the {name} {CELLS[cell]} of the picture {times} as large and keep it where it is",))  # fmt: skip


def recolour_forms(name: str, colour: str, cell: int) -> tuple[Form, ...]:
    """Words for giving a thing another colour."""
    return _forms("recolour", (f"make the {name} {colour}", f"change the colour of the {name} to {colour}"),
                  (f"paint the {name} {CELLS[cell]} of the picture {colour} and keep its shape and shading",))  # fmt: skip


def count_forms(name: str, had: int, wanted: int) -> tuple[Form, ...]:
    """Words for another number of the same thing."""
    many = plural(name)
    step = NUMBERS[abs(wanted - had)]
    if wanted > had:
        difference = f"add {step} more {name if abs(wanted - had) == 1 else many}"
    else:
        difference = f"remove {step} of the {NUMBERS[had]} {many}"
    goal = f"there should be {NUMBERS[wanted]} {name if wanted == 1 else many}"
    return _forms("count", (difference, goal), (f"change the number of {many} in the picture from {NUMBERS[had]} to {NUMBERS[wanted]}",))


# --- compositions ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What an image draws for one operation: the thing, another of its kind to put instead, a companion to leave alone
    (None: the thing is alone), and the cells in the order in which they are taken."""

    thing: CutOut
    other: CutOut
    companion: CutOut | None
    cells: tuple[int, ...]
    seed: str

    def pasted(self, item: CutOut, place: int, size: float = NORMAL) -> Pasted:
        """`item` in the `place`-th cell of the draw."""
        shift = generator("shift", self.seed, place).uniform(-JITTER, JITTER, 2)
        return Pasted(item, self.cells[place], size, None, (float(shift[0]), float(shift[1])))

    def around(self) -> tuple[Pasted, ...]:
        """The companion, in the last cell."""
        return (self.pasted(self.companion, 8),) if self.companion else ()


def draw_things(operation: str, image_id: str, cutouts: CutOuts, companion: bool | None = None) -> Drawn:
    """Draw for `operation`; `companion` says whether there shall be one (None: half the time). The three things have
    different nouns where the set allows, so that a name means one of them."""
    order = [cutouts.items[draw_bits("thing", operation, image_id, number) % len(cutouts.items)] for number in range(24)]
    chosen: list[CutOut] = []
    for item in order:
        if len(chosen) < 3 and item.noun not in {known.noun for known in chosen}:
            chosen.append(item)
    chosen += order[: 3 - len(chosen)]
    if companion is None:
        companion = draw_bits("companion", operation, image_id) / 2**64 < COMPANION_SHARE
    cells = tuple(shuffled(range(9), "cells", operation, image_id))
    seed = f"{operation} {image_id} {' '.join(item.cutout_id for item in chosen)}"
    return Drawn(chosen[0], chosen[1], chosen[2] if companion and chosen[2].noun != chosen[0].noun else None, cells, seed)


def add(drawn: Drawn) -> Composition:
    """A new thing."""
    thing = drawn.pasted(drawn.thing, 0)
    return Composition("add", drawn.around(), (*drawn.around(), thing), add_forms(thing.name, thing.cell), "remove",
                       remove_forms(thing.name, thing.cell))  # fmt: skip


def remove(drawn: Drawn) -> Composition:
    """A thing goes."""
    thing = drawn.pasted(drawn.thing, 0)
    return Composition("remove", (*drawn.around(), thing), drawn.around(), remove_forms(thing.name, thing.cell), "add",
                       add_forms(thing.name, thing.cell))  # fmt: skip


def replace(drawn: Drawn) -> Composition:
    """Another thing in its place."""
    thing, other = drawn.pasted(drawn.thing, 0), drawn.pasted(drawn.other, 0)
    return Composition("replace", (*drawn.around(), thing), (*drawn.around(), other), replace_forms(thing.name, other.name, thing.cell),
                       "replace", replace_forms(other.name, thing.name, thing.cell))  # fmt: skip


def move(drawn: Drawn) -> Composition:
    """The same thing in another cell."""
    thing = drawn.pasted(drawn.thing, 0)
    moved = dataclasses.replace(thing, cell=drawn.cells[1])
    return Composition("move", (*drawn.around(), thing), (*drawn.around(), moved), move_forms(thing.name, thing.cell, moved.cell), "move",
                       move_forms(thing.name, moved.cell, thing.cell))  # fmt: skip


def resize(drawn: Drawn) -> Composition:
    """The same thing about twice, or half, as large."""
    grow = draw_bits("grow", drawn.seed) % 2 == 0
    thing, after = drawn.pasted(drawn.thing, 0, SMALL if grow else LARGE), drawn.pasted(drawn.thing, 0, LARGE if grow else SMALL)
    return Composition("resize", (*drawn.around(), thing), (*drawn.around(), after), resize_forms(thing.name, grow, thing.cell), "resize",
                       resize_forms(thing.name, not grow, thing.cell))  # fmt: skip


def recolour(drawn: Drawn) -> Composition:
    """The same thing in another colour. The way back has words only where one word says the colour it had."""
    thing = drawn.pasted(drawn.thing, 0)
    colour = draw_colour("recolour", drawn.seed, without=similar_colours(thing.item.colour))
    after = dataclasses.replace(thing, tint=colour)
    back = recolour_forms(after.name, thing.item.colour, thing.cell) if thing.item.colour else None
    return Composition("recolour", (*drawn.around(), thing), (*drawn.around(), after), recolour_forms(thing.name, colour, thing.cell),
                       "recolour", back)  # fmt: skip


def count(drawn: Drawn) -> Composition:
    """More, or fewer, of the same thing."""
    had, wanted = pick(((1, 2), (1, 3), (2, 3), (2, 4), (3, 1), (3, 2), (4, 2)), "count", drawn.seed)
    things = tuple(drawn.pasted(drawn.thing, place) for place in range(max(had, wanted)))
    return Composition("count", (*drawn.around(), *things[:had]), (*drawn.around(), *things[:wanted]),
                       count_forms(things[0].name, had, wanted), "count", count_forms(things[0].name, wanted, had))  # fmt: skip


OPERATIONS: dict[str, Callable[[Drawn], Composition]] = {
    "add": add, "remove": remove, "replace": replace, "move": move, "resize": resize, "recolour": recolour, "count": count,
}  # fmt: skip


def similar_colours(colour: str | None) -> set[str]:
    """The colours that are too near to `colour` to be told from it: within 110 levels in RGB."""
    if colour is None:
        return set()
    here = np.array(COLOURS[colour], float)
    return {name for name, value in COLOURS.items() if np.linalg.norm(here - value) < 110}


# --- the route -------------------------------------------------------------------------------------------------------


class CompositeInstructor:
    """Asks for each operation once, in an order of the image's own."""

    name = "composite"

    def __init__(self, cutouts: CutOuts) -> None:
        self.cutouts, self.digest = cutouts, cutouts.digest

    def requests(self, pixels: Pixels, image_id: str, wanted: Sequence[str] = ()) -> Iterable[Request]:
        for operation in shuffled(list(OPERATIONS), "composite", image_id):
            composition = OPERATIONS[operation](draw_things(operation, image_id, self.cutouts))
            yield said(operation, list(composition.forms), operation, image_id, plan=composition)


class CompositeEditor:
    """Pastes both pictures of a composition; `inverse` adds the way back."""

    name = "composite"

    def __init__(self, cutouts: CutOuts, inverse: bool = True) -> None:
        self.cutouts, self.inverse = cutouts, inverse
        self.digest = f"{cutouts.digest} {'with inverse' if inverse else 'forward'} with parts"

    def tries(self, pixels: Pixels, image_id: str, request: Request) -> list[Try]:
        plan: Composition = request.plan
        try:
            source, target = (paste(pixels, things, self.cutouts) for things in (plan.before, plan.after))
            mask = covered(pixels.shape, plan.changed, self.cutouts)
        except CutOutError:
            return []  # the file is broken: the image's next request takes its place
        if changed_pixels(source, target).mean() < LEAST_CHANGE:
            return []
        # A picture with nothing on it is the photo itself, and is not stored twice.
        kept_source, kept_target = source if plan.before else None, target if plan.after else None
        parts = tuple(sorted({self.cutouts.content_id(thing.item) for thing in (*plan.before, *plan.after)}))
        found = [Try(request, kept_target, kept_source, mask, parts=parts)]
        if self.inverse and plan.inverse_forms is not None:
            back = said(plan.inverse_operation, list(plan.inverse_forms), "inverse", plan.operation, image_id)
            found.append(Try(back, kept_source, kept_target, mask, relation="inverse", parts=parts))
        return found


def open_cutouts(path: str | None, digest: str) -> CutOuts:
    """The cut-outs of a folder, or the drawn ones where no folder is given."""
    return CutOutFolder(path, digest) if path else DrawnCutOuts()
