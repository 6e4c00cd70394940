"""Styles of a whole picture that can be made exactly: black and white, sepia, a negative, a poster, large pixels.
A target is compared with each form of the style that the words leave open, so that another style is told from it."""

from __future__ import annotations

import itertools
import re

import numpy as np

from dreamlite_data.operators.change import Pixels
from dreamlite_data.operators.exact import OPERATIONS

_STYLES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("greyscale", re.compile(r"\b(?:in|into|to|make it|turn it|picture|photo|image) (?:a )?(?:black and white|gr[ea]y-?scale|monochrome)\b|\bremove all colou?rs\b")),
    ("sepia", re.compile(r"\bsepia\b")),
    ("negative", re.compile(r"\binvert (?:the|every|all) colou?rs?\b|\binto a negative\b")),
    ("posterise", re.compile(r"\bposteri[sz]e\b|\bposter print\b|\bfew flat colou?rs\b")),
    ("pixelate", re.compile(r"\bpixelate\b|\blarge pixels\b|\bpixel art\b|\bsquare blocks\b")),
)
_LEAVES = re.compile(r"\b(?:this|the) (?:black and white|sepia|greyscale|negative)\b")
"""Describes the source: "add colours to this black and white photo"."""


def said_style(text: str) -> str | None:
    """The exact operation that an instruction names as a style of the whole picture; None where it names none, or two."""
    words = _LEAVES.sub("it", text.lower())
    found = {name for name, form in _STYLES if form.search(words)}
    return next(iter(found)) if len(found) == 1 else None


def style_distance(style: str, source: Pixels, target: Pixels) -> float:
    """Mean difference of the target from what the style makes of the source, as a share of the range: the least over the
    amounts that words leave open."""
    operation = OPERATIONS[style]
    amounts = [dict(zip(operation.choices, values, strict=True)) for values in itertools.product(*operation.choices.values())]
    wanted = target.astype(np.float32)
    return min(float(np.abs(operation.apply(source, one).astype(np.float32) - wanted).mean()) for one in amounts) / 255
