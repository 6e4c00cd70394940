"""Measure a triplet for the rules of verification: change inside and outside the mask, structure kept, colour, side, number, direction.
A measure that cannot be taken is absent, and one that the words do not call for is not applicable; neither is a number."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
from scipy import ndimage

from dreamlite_data.operators.appearance import cell_means, phash
from dreamlite_data.operators.change import (
    CHANGED_LEVELS,
    LUMA,
    Pixels,
    correlation,
    difference,
    estimated_mask,
    regions,
    similarity_map,
    smooth_difference,
)
from dreamlite_data.operators.motion import motion_correlation, said_motion
from dreamlite_data.operators.style import said_style, style_distance
from dreamlite_data.operators.wording import (
    SAID_COLOURS,
    said_background_colour,
    said_colour,
    said_destination,
    said_difference,
    said_direction,
    said_sides,
    said_thing_colour,
)

MEASURES_VERSION = 1
"""Raised with every change of what a measure is."""
NOT_APPLICABLE = float("nan")
"""The condition has nothing to ask of this triplet: no side is named, no number, nothing lies outside."""
LEAST_SHIFT = {"brightness": 2.0, "contrast": 0.02, "saturation": 1.0, "warmth": 1.5, "sharpness": 0.03}
"""How far a quantity must go for its direction to count: levels, or for contrast and sharpness the logarithm of the ratio."""

SHOWN_SHARE = 0.3
"""Of what changed, so much at least shows the thing that the words name, before or after: the rest may be what it hid or hides."""
SMALLEST_SEEN_PX = 12
CLEARLY_NEARER = 0.15  # as a share of a channel's range
LEAST_OUTSIDE = 0.01  # share of the picture below which there is no outside to speak of
MARGIN_PX = 2
"""How far from the mask a change still belongs to its edge: a soft edge, and the window of the smoothing."""

Measures = dict[str, float | None]


def measure_triplet(
    source: Pixels, target: Pixels, instruction: str, mask: np.ndarray | None = None, names: Collection[str] | None = None
) -> Measures:
    """The measures of a triplet whose pictures, uint8 [H, W, 3], have one size; `mask` is where the edit belongs, bool [H, W],
    or None where nobody says: then it is estimated from the change, and what compares the two is None. `names` leaves out
    the dear ones that nobody reads (None: all are taken)."""
    changed = difference(source, target) > CHANGED_LEVELS
    region = estimated_mask(changed) if mask is None or names is None or "count_agrees" in names else mask
    inside = region if mask is None else mask
    outside = ~_grown(inside)
    smooth = smooth_difference(source, target)
    any_outside = bool(outside.any())
    clearly = smooth > CHANGED_LEVELS
    measures: Measures = {
        "edited_fraction": float(changed.mean()),
        "clear_fraction": float(clearly.mean()),
        "inside_change": float(smooth[inside].mean()) / 255 if inside.any() else 0.0,
        "outside_change": float(smooth[outside].mean()) / 255 if any_outside else NOT_APPLICABLE,
        "structure_outside": NOT_APPLICABLE,
        "inside_fraction": None,
        "outside_fraction": None,
    }
    if outside.mean() > LEAST_OUTSIDE:
        measures["structure_outside"] = float(similarity_map(source, target)[outside].mean())
    if mask is not None:
        measures["inside_fraction"] = float(changed[mask].mean()) if mask.any() else 0.0
        measures["outside_fraction"] = float(clearly[outside].mean()) if any_outside else NOT_APPLICABLE
    dear: dict[str, Callable[[], float | None]] = {
        "correlation": lambda: correlation(source, target),
        "phash_distance": lambda: float((int(_hash(source)) ^ int(_hash(target))).bit_count()),
        "side_agrees": lambda: _side_agrees(instruction, clearly),
        "count_agrees": lambda: _count_agrees(instruction, region),
        "colour_distance": lambda: _colour_distance(instruction, target, clearly),
        "direction_agrees": lambda: _direction_agrees(instruction, source, target),
        "thing_colour_distance": lambda: _thing_colour_distance(instruction, source, target, clearly),
        "destination_agrees": lambda: _destination_agrees(instruction, source, target, clearly),
        "background_distance": lambda: _background_distance(instruction, target, clearly),
        "motion_correlation": lambda: _motion_correlation(instruction, source, target),
        "style_distance": lambda: _style_distance(instruction, source, target),
    }
    return measures | {name: measure() for name, measure in dear.items() if names is None or name in names}


def _grown(mask: np.ndarray) -> np.ndarray:
    """`mask` and MARGIN_PX around it, in a square neighbourhood: as far as the smoothing carries a change."""
    return ndimage.maximum_filter(mask, size=2 * MARGIN_PX + 1)


def _hash(pixels: Pixels) -> np.uint64:
    return phash(cell_means(pixels)[None])[0]


def _side_agrees(instruction: str, changed: np.ndarray) -> float:
    sides = said_sides(instruction)
    if not sides:
        return NOT_APPLICABLE
    return float(bool(changed.any()) and sides <= _sides_of(changed))


def _count_agrees(instruction: str, region: np.ndarray) -> float:
    step = said_difference(instruction)
    return NOT_APPLICABLE if step is None else float(regions(region) == step)


def _colour_distance(instruction: str, target: Pixels, changed: np.ndarray) -> float:
    """From the colour that the words name to the middle of what changed, as a share of a channel's range."""
    colour = said_colour(instruction)
    return NOT_APPLICABLE if colour is None or not changed.any() else _distance_to(colour, target, changed)


def _background_distance(instruction: str, target: Pixels, changed: np.ndarray) -> float:
    """The same for the colour that the background shall have."""
    colour = said_background_colour(instruction)
    return NOT_APPLICABLE if colour is None or not changed.any() else _distance_to(colour, target, changed)


def _distance_to(colour: str, target: Pixels, changed: np.ndarray) -> float:
    shown = np.median(target[_core(changed)].astype(np.float32), axis=0)
    return float(np.linalg.norm(shown - np.array(SAID_COLOURS[colour], np.float32)) / 255)


def _core(changed: np.ndarray) -> np.ndarray:
    """What changed without its edges, which are mixed colours; all of it where nothing else is left."""
    core = ndimage.binary_erosion(changed, iterations=2)
    return core if core.sum() >= 6 else changed


def _distances(colour: str, pixels: Pixels, where: np.ndarray) -> np.ndarray:
    """From each pixel in `where` to a colour, as a share of a channel's range."""
    return np.linalg.norm(pixels[where].astype(np.float32) - np.array(SAID_COLOURS[colour], np.float32), axis=1) / 255


def _thing_colour_distance(instruction: str, source: Pixels, target: Pixels, changed: np.ndarray) -> float:
    """From the colour of the thing that the words are about to what changed, before or after: whatever is done to a red star,
    it takes place where red is or comes. Tells the right thing from another one without a mask."""
    colour = said_thing_colour(instruction)
    if colour is None or not changed.any():
        return NOT_APPLICABLE
    core = _core(changed)
    nearest = np.minimum(_distances(colour, source, core), _distances(colour, target, core))
    return float(np.quantile(nearest, SHOWN_SHARE))


def _destination_agrees(instruction: str, source: Pixels, target: Pixels, changed: np.ndarray) -> float:
    """Whether the colour of the moved thing came up on the sides that the words name as its goal."""
    colour, goal = said_thing_colour(instruction), said_destination(instruction)
    core = _core(changed)
    if colour is None or not goal or not core.any():
        return NOT_APPLICABLE
    came = np.zeros_like(changed)
    came[core] = _distances(colour, source, core) - _distances(colour, target, core) > CLEARLY_NEARER
    if came.sum() < SMALLEST_SEEN_PX:
        return NOT_APPLICABLE
    if goal == {"middle"}:
        return float(all(1 / 3 <= place <= 2 / 3 for place in _middle_of(came)))
    return float(goal <= _sides_of(came))


def _motion_correlation(instruction: str, source: Pixels, target: Pixels) -> float | None:
    motion = said_motion(instruction)
    return NOT_APPLICABLE if motion is None else motion_correlation(motion, source, target)


def _style_distance(instruction: str, source: Pixels, target: Pixels) -> float:
    style = said_style(instruction)
    return NOT_APPLICABLE if style is None else style_distance(style, source, target)


def _direction_agrees(instruction: str, source: Pixels, target: Pixels) -> float:
    direction = said_direction(instruction)
    if direction is None:
        return NOT_APPLICABLE
    name, sign = direction
    return float(sign * _shift(name, source, target) > LEAST_SHIFT[name])


def _sides_of(changed: np.ndarray) -> set[str]:
    """The sides of the picture on which the middle of the change lies."""
    across, down = _middle_of(changed)
    return {"left" if across < 0.5 else "right", "top" if down < 0.5 else "bottom"}


def _middle_of(changed: np.ndarray) -> tuple[float, float]:
    """(across, down) of the middle of what is set in bool [H, W], each in 0..1."""
    rows, columns = np.nonzero(changed)
    return float((columns.mean() + 0.5) / changed.shape[1]), float((rows.mean() + 0.5) / changed.shape[0])


def _shift(name: str, source: Pixels, target: Pixels) -> float:
    """How much more of a quantity the target has than the source."""
    first, second = source.astype(np.float32), target.astype(np.float32)
    if name == "brightness":
        return float((second - first).mean())
    if name == "saturation":
        return float((second.max(-1) - second.min(-1)).mean() - (first.max(-1) - first.min(-1)).mean())
    if name == "warmth":
        return float((second[..., 0] - second[..., 2]).mean() - (first[..., 0] - first[..., 2]).mean())
    lumas = [values @ LUMA for values in (first, second)]
    if name == "sharpness":
        lumas = [ndimage.laplace(luma, mode="nearest") for luma in lumas]
    return float(np.log((lumas[1].std() + 1) / (lumas[0].std() + 1)))
