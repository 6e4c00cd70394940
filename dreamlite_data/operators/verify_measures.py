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
from dreamlite_data.operators.wording import COLOURS, said_colour, said_difference, said_direction, said_sides

NOT_APPLICABLE = float("nan")
"""The condition has nothing to ask of this triplet: no side is named, no number, nothing lies outside."""
LEAST_SHIFT = {"brightness": 2.0, "contrast": 0.02, "saturation": 1.0, "warmth": 1.5, "sharpness": 0.03}
"""How far a quantity must go for its direction to count: levels, or for contrast and sharpness the logarithm of the ratio."""

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
    if colour is None or not changed.any():
        return NOT_APPLICABLE
    core = ndimage.binary_erosion(changed, iterations=2)
    shown = np.median(target[core if core.sum() >= 6 else changed].astype(np.float32), axis=0)
    return float(np.linalg.norm(shown - np.array(COLOURS[colour], np.float32)) / 255)


def _direction_agrees(instruction: str, source: Pixels, target: Pixels) -> float:
    direction = said_direction(instruction)
    if direction is None:
        return NOT_APPLICABLE
    name, sign = direction
    return float(sign * _shift(name, source, target) > LEAST_SHIFT[name])


def _sides_of(changed: np.ndarray) -> set[str]:
    """The sides of the picture on which the middle of the change lies."""
    rows, columns = np.nonzero(changed)
    across, down = (columns.mean() + 0.5) / changed.shape[1], (rows.mean() + 0.5) / changed.shape[0]
    return {"left" if across < 0.5 else "right", "top" if down < 0.5 else "bottom"}


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
