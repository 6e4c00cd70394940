"""Whether the whole picture moved as an instruction says: mirrored, turned, zoomed.
What was asked for is done to the source, and the target is compared with that; a change of place alone proves nothing."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
from PIL import Image

from dreamlite_data.operators.change import LUMA, Pixels

COMPARED_PX = 128
"""Longer side at which pictures are compared: a row of pixels more or less at an edge no longer counts."""
COARSE_PX = 64
ZOOMS = tuple(float(zoom) for zoom in np.geomspace(1.15, 4.0, 14))
"""What is tried where the words name no amount; the best is then refined, for neighbours differ by a tenth."""
PLACE_SLACK = 0.25
"""How far a window that shall lie in a corner or the middle may be from there, as a share of the way that it can go."""

_HALF = re.compile(r"\b180\b|upside down|on its head|right way up|\bhalf a turn\b|by a half\b")
_QUARTER = re.compile(r"\b(?:90|quarter|clockwise|anti-?clockwise|counter-?clockwise)\b")
_TURN = re.compile(r"\b(?:rotate|rotated|rotation|turn|turned)\b|upside down|on its head")
_ANTICLOCKWISE = re.compile(r"anti-?clockwise|counter-?clockwise|\bto the left\b")
_CLOCKWISE = re.compile(r"(?<!anti)(?<!anti-)(?<!counter)(?<!counter-)\bclockwise|\bto the right\b")
_UNDO = re.compile(r"\b(?:undo|back|was (?:turned|rotated))\b")
_MIRROR = re.compile(r"\b(?:mirror|flip) (?:the|this|it)\b|\b(?:mirrored|flipped|reversed)\b")
_UP_DOWN = re.compile(r"\bvertically\b|\bvertical flip\b|\bhorizontal axis\b|\btop to bottom\b|\bon top\b")
_ZOOM = re.compile(r"\bzoom (?:in|into|in on|out)\b|\bcrop to\b|\benlarge the (?:picture|photo|image)\b")
_PERCENT = re.compile(r"\b(\d{3})\s?%")
_PLACE = re.compile(r"\b(?:into|in on|to|on) the (?:(top|upper|bottom|lower)[ -]?)?(left|right|middle|cent(?:er|re))?\b")


@dataclasses.dataclass(frozen=True)
class Motion:
    """`kind` is 'mirror', 'turn' or 'zoom'; `ways` are the candidates that the words leave open: axes of a mirror, numbers of
    quarter turns against the clock, amounts of a zoom. `place` is where a zoom goes, (across, down) in 0..1, None where
    unsaid; `out` turns a zoom round."""

    kind: str
    ways: tuple[float, ...]
    place: tuple[float | None, float | None] = (None, None)
    out: bool = False


def said_motion(text: str) -> Motion | None:
    """The motion of the whole picture that an instruction asks for; None where it asks for none."""
    words = text.lower()
    if _ZOOM.search(words):
        amount = _PERCENT.search(words)
        return Motion("zoom", (int(amount[1]) / 100,) if amount else ZOOMS, _said_place(words), bool(re.search(r"\bzoom out\b", words)))
    if _HALF.search(words) and _TURN.search(words):
        return Motion("turn", (2,))
    if _TURN.search(words) and _QUARTER.search(words):
        ways = {(-1 if _CLOCKWISE.search(words) else 0), (1 if _ANTICLOCKWISE.search(words) else 0)} - {0} or {1, -1}
        return Motion("turn", tuple(sorted(-way if _UNDO.search(words) else way for way in ways)))
    if _MIRROR.search(words):
        return Motion("mirror", (0,) if _UP_DOWN.search(words) else (1,))
    return None


def _said_place(words: str) -> tuple[float | None, float | None]:
    for match in _PLACE.finditer(words):
        rows, columns = match.groups()
        if rows or columns:
            middle = columns is not None and columns not in ("left", "right")
            across = 0.5 if middle else {"left": 0.0, "right": 1.0}.get(columns or "")
            return across, 0.5 if middle and not rows else {"top": 0.0, "upper": 0.0, "bottom": 1.0, "lower": 1.0}.get(rows or "")
    return None, None


def motion_correlation(motion: Motion, source: Pixels, target: Pixels) -> float | None:
    """Normalised cross-correlation, in [-1, 1], of the target with what the motion makes of the source: the best of its
    ways. None where no way can be compared (a quarter turn of a picture that is not square, a flat picture)."""
    if motion.kind == "zoom":
        return _zoom_correlation(motion, *((target, source) if motion.out else (source, target)))
    before, after = (_luma(pixels, COMPARED_PX) for pixels in (source, target))
    found = []
    for way in motion.ways:
        moved = np.flip(before, int(way)) if motion.kind == "mirror" else np.rot90(before, int(way))
        if moved.shape == after.shape and (value := _correlated(moved, after)) is not None:
            found.append(value)
    return max(found, default=None)


def _correlated(first: np.ndarray, second: np.ndarray) -> float | None:
    if first.std() < 1 or second.std() < 1:
        return None
    return float(((first - first.mean()) * (second - second.mean())).mean() / (first.std() * second.std()))


def _zoom_correlation(motion: Motion, wide: Pixels, near: Pixels) -> float | None:
    """How well `near` is found as a window of `wide`."""
    if min(_luma(pixels, COARSE_PX).std() for pixels in (wide, near)) < 1:
        return None
    if len(motion.ways) == 1:
        return _window_match(wide, near, motion.ways[0], COMPARED_PX, motion.place)
    coarse = max(motion.ways, key=lambda zoom: _window_match(wide, near, zoom, COARSE_PX, motion.place))
    return max(_window_match(wide, near, coarse * step, COMPARED_PX, motion.place) for step in (0.95, 0.975, 1.0, 1.025, 1.05))


def _window_match(wide: Pixels, near: Pixels, zoom: float, side_px: int, place: tuple[float | None, float | None]) -> float:
    from skimage.feature import match_template

    whole = _luma(wide, side_px)
    window = _luma(near, side_px / zoom)
    window = window[: whole.shape[0], : whole.shape[1]]
    matches = match_template(whole, window)
    for axis, wanted in ((1, place[0]), (0, place[1])):
        way = matches.shape[axis] - 1
        if wanted is None or way < 1:
            continue
        steps = np.abs(np.arange(way + 1) / way - wanted) <= PLACE_SLACK
        matches = np.compress(steps, matches, axis=axis)
    return float(np.nan_to_num(matches).max())


def _luma(pixels: Pixels, side_px: float) -> np.ndarray:
    """Luma, float32, with a longer side of about `side_px`; never enlarged."""
    height, width = pixels.shape[:2]
    scale = min(1.0, side_px / max(height, width))
    size = (max(8, math.floor(width * scale + 0.5)), max(8, math.floor(height * scale + 0.5)))
    image = Image.fromarray(pixels)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.float32) @ LUMA
