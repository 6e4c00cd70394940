"""Measure a triplet for the rules of verification: change inside and outside the mask, structure kept, colour, side, number, direction.
A measure that cannot be taken is absent, and one that the words do not call for is not applicable; neither is a number."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

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
from dreamlite_data.operators.quality import phash
from dreamlite_data.operators.wording import COLOURS, said_colour, said_difference, said_direction, said_sides

NOT_APPLICABLE = float("nan")
"""The condition has nothing to ask of this triplet: no side is named, no number, nothing lies outside."""
LEAST_SHIFT = {"brightness": 2.0, "contrast": 0.02, "saturation": 1.0, "warmth": 1.5, "sharpness": 0.03}
"""How far a quantity must go for its direction to count: levels, or for contrast and sharpness the logarithm of the ratio."""

MARGIN_PX = 2
"""How far from the mask a change still belongs to its edge: a soft edge, and the window of the smoothing."""

Measures = dict[str, float | None]


def measure_triplet(source: Pixels, target: Pixels, instruction: str, mask: np.ndarray | None = None) -> Measures:
    """All measures of a triplet whose pictures, uint8 [H, W, 3], have one size; `mask` is where the edit belongs, bool [H, W],
    or None where nobody says: then it is estimated from the change, and what compares the two is None."""
    changed = difference(source, target) > CHANGED_LEVELS
    region = estimated_mask(changed)
    inside = region if mask is None else mask
    outside = ~ndimage.binary_dilation(inside, iterations=MARGIN_PX)
    smooth = smooth_difference(source, target)
    share = smooth / 255
    measures: Measures = {
        "edited_fraction": float(changed.mean()),
        "change": float(share.mean()),
        "inside_change": float(share[inside].mean()) if inside.any() else 0.0,
        "outside_change": float(share[outside].mean()) if outside.any() else NOT_APPLICABLE,
        "structure_outside": NOT_APPLICABLE,
        "inside_fraction": None,
        "outside_fraction": None,
        "mask_fraction": float(inside.mean()),
        "correlation": correlation(source, target),
        "phash_distance": float(bin(int(_hash(source)) ^ int(_hash(target))).count("1")),
    }
    if outside.mean() > 0.01:
        measures["structure_outside"] = float(similarity_map(source, target)[outside].mean())
    if mask is not None:
        measures["inside_fraction"] = float(changed[mask].mean()) if mask.any() else 0.0
        measures["outside_fraction"] = float((smooth > CHANGED_LEVELS)[outside].mean()) if outside.any() else NOT_APPLICABLE
    return measures | _of_words(source, target, instruction, changed, region)


def _hash(pixels: Pixels) -> np.uint64:
    return phash((pixels.astype(np.float32) @ LUMA)[None])[0]


def _of_words(source: Pixels, target: Pixels, instruction: str, changed: np.ndarray, region: np.ndarray) -> Measures:
    """What the words name and the change shows: 1.0 where they agree, 0.0 where not, a distance for the colour."""
    answer: Measures = {"side_agrees": NOT_APPLICABLE, "count_agrees": NOT_APPLICABLE, "colour_distance": NOT_APPLICABLE,
                        "direction_agrees": NOT_APPLICABLE}  # fmt: skip
    sides, step, colour, direction = said_sides(instruction), said_difference(instruction), said_colour(instruction), said_direction(instruction)
    if sides:
        answer["side_agrees"] = float(bool(changed.any()) and sides <= _sides_of(changed & region if region.any() else changed))
    if step is not None:
        answer["count_agrees"] = float(regions(region) == step)
    if colour is not None and changed.any():
        core = ndimage.binary_erosion(changed, iterations=2)
        shown = np.median(target[core if core.sum() >= 6 else changed].astype(np.float32), axis=0)
        answer["colour_distance"] = float(np.linalg.norm(shown - np.array(COLOURS[colour], np.float32)) / 255)
    if direction is not None:
        name, sign = direction
        answer["direction_agrees"] = float(sign * _shift(name, source, target) > LEAST_SHIFT[name])
    return answer


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
