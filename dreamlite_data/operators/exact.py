"""Exact operations on whole pictures (exposure, colour, blur, noise, turn, zoom, ...), as functions and in words.
Amounts come from the image's id, so a triplet can be checked by doing the operation again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from dreamlite_data.operators.change import LUMA, Pixels
from dreamlite_data.operators.draw import draw_bits, pick

Amounts = dict[str, Any]
SEPIA = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]], dtype=np.float32)
"""The matrix of the W3C Filter Effects `sepia(1)`."""
GREY_LEVELS = 10.0  # mean spread of the channels, in levels, under which a picture has no colours to speak of


def _always(pixels: Pixels) -> bool:
    return True


def has_colour(pixels: Pixels) -> bool:
    """Whether there are colours that an edit could change."""
    values = pixels.astype(np.int16)
    return float((values.max(-1) - values.min(-1)).mean()) > GREY_LEVELS


def _square(pixels: Pixels) -> bool:
    return pixels.shape[0] == pixels.shape[1]


def _whole(pixels: Pixels, amounts: Amounts) -> bool:
    return True


def _unclipped(pixels: Pixels, amounts: Amounts) -> bool:
    return float(pixels.max()) * amounts["percent"] / 100 <= 255


@dataclasses.dataclass(frozen=True)
class Words:
    """How an operation is asked for: templates over its amounts, in a short and a long form."""

    edit_type: str
    short: tuple[str, ...]
    long: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Operation:
    """`choices` are the amounts that an image's id draws from; `apply` makes the target. `inverse` are the words for the
    way back, where the source is told exactly by target and words: `invertible` says whether that holds for a source."""

    name: str
    words: Words
    apply: Callable[[Pixels, Amounts], Pixels]
    choices: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    fits: Callable[[Pixels], bool] = _always
    inverse: Words | None = None
    invertible: Callable[[Pixels, Amounts], bool] = _whole

    def amounts(self, image_id: str) -> Amounts:
        """What `image_id` draws."""
        drawn = {name: pick(values, "amount", self.name, name, image_id) for name, values in self.choices.items()}
        return drawn | {"seed": draw_bits("noise", self.name, image_id)}

    def forms(self, words: Words, image_id: str) -> list[tuple[str, str, str]]:
        """Every wording of `words` for this image: (form, text, prompt_id)."""
        amounts = {name: SAID.get((name, value), value) for name, value in self.amounts(image_id).items()}
        return [
            (form, template.format(**amounts), f"exact/{self.name}/{words.edit_type}/{form}/{index}")
            for form, templates in (("short", words.short), ("long", words.long))
            for index, template in enumerate(templates)
        ]

    def __call__(self, pixels: Pixels, image_id: str) -> Pixels:
        return self.apply(pixels, self.amounts(image_id))

    def can_be_undone(self, pixels: Pixels, image_id: str) -> bool:
        """Whether the way back from the target to this source may be asked for."""
        return self.inverse is not None and self.invertible(pixels, self.amounts(image_id))


SAID: dict[tuple[str, Any], str] = {
    ("way", "clockwise"): "to the right",
    ("way", "anticlockwise"): "to the left",
}
"""How an amount is said where its value is not its word."""


def recognise(instruction: str, image_id: str, inverse: bool = False) -> Operation | None:
    """The operation that `instruction` asks of the image (or, `inverse`, whose result it asks to undo); None where the
    words are of no exact operation, or name another amount than this image draws."""
    for operation in OPERATIONS.values():
        words = operation.inverse if inverse else operation.words
        if words is not None and any(text == instruction for _, text, _ in operation.forms(words, image_id)):
            return operation
    return None


def is_exact(instruction: str, source: Pixels, source_id: str, target: Pixels, target_id: str) -> bool | None:
    """Whether `target` is exactly what `instruction` makes of `source`; None where the words are of no exact operation."""
    if not _ANY_WORDING.fullmatch(instruction):
        return None
    known = False
    operation = recognise(instruction, source_id)
    if operation is not None:
        known = True
        if np.array_equal(operation(source, source_id), target):
            return True
    operation = recognise(instruction, target_id, inverse=True)
    if operation is not None:
        known = True
        if operation.can_be_undone(target, target_id) and np.array_equal(operation(target, target_id), source):
            return True
    return False if known else None


# --- the operations --------------------------------------------------------------------------------------------------


def _rounded(values: np.ndarray) -> Pixels:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _scale(pixels: Pixels, amounts: Amounts) -> Pixels:
    return _rounded(pixels.astype(np.float32) * (amounts["percent"] / 100))


def _contrast(pixels: Pixels, amounts: Amounts) -> Pixels:
    return _rounded((pixels.astype(np.float32) - 128) * (amounts["percent"] / 100) + 128)


def _grey(pixels: Pixels) -> np.ndarray:
    return np.repeat((pixels.astype(np.float32) @ LUMA)[..., None], 3, axis=2)


def _saturation(pixels: Pixels, amounts: Amounts) -> Pixels:
    grey = _grey(pixels)
    return _rounded(grey + (pixels - grey) * (amounts["percent"] / 100))


def _tint(factors: tuple[float, float, float]) -> Callable[[Pixels, Amounts], Pixels]:
    return lambda pixels, amounts: _rounded(pixels.astype(np.float32) * np.array(factors, np.float32))


def _rotate_hue(pixels: Pixels, amounts: Amounts) -> Pixels:
    # A third of the colour circle is an exchange of channels, so nothing is rounded and the way back is exact.
    return np.ascontiguousarray(pixels[..., [2, 0, 1]])


def _blur(pixels: Pixels, amounts: Amounts) -> Pixels:
    sigma = amounts["sigma_px"]
    return _rounded(ndimage.gaussian_filter(pixels.astype(np.float32), (sigma, sigma, 0), mode="nearest"))


def _sharpen(pixels: Pixels, amounts: Amounts) -> Pixels:
    values = pixels.astype(np.float32)
    return _rounded(values + amounts["strength"] * (values - ndimage.gaussian_filter(values, (1.2, 1.2, 0), mode="nearest")))


def _noise(pixels: Pixels, amounts: Amounts) -> Pixels:
    grain = np.random.default_rng(amounts["seed"]).standard_normal(pixels.shape, dtype=np.float32)
    return _rounded(pixels + amounts["levels"] * grain)


def _haze(pixels: Pixels, amounts: Amounts) -> Pixels:
    share = amounts["percent"] / 100
    return _rounded(pixels * (1 - share) + 225 * share)


def _pixelate(pixels: Pixels, amounts: Amounts) -> Pixels:
    height, width = pixels.shape[:2]
    cells = amounts["cells"]
    small = (max(1, round(width * cells / max(width, height))), max(1, round(height * cells / max(width, height))))
    image = Image.fromarray(pixels).resize(small, Image.Resampling.BOX)
    return np.array(image.resize((width, height), Image.Resampling.NEAREST))


def _posterise(pixels: Pixels, amounts: Amounts) -> Pixels:
    steps = amounts["steps"] - 1
    return _rounded(np.rint(pixels.astype(np.float32) / 255 * steps) / steps * 255)


def _turn(pixels: Pixels, amounts: Amounts) -> Pixels:
    return np.ascontiguousarray(np.rot90(pixels, 3 if amounts["way"] == "clockwise" else 1))


_CORNERS = {"middle": (0.5, 0.5), "top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}


def _zoom(pixels: Pixels, amounts: Amounts) -> Pixels:
    height, width = pixels.shape[:2]
    share = 100 / amounts["zoom_percent"]
    across, down = _CORNERS[amounts["place"]]
    left, top = (1 - share) * width * across, (1 - share) * height * down
    box = (left, top, left + share * width, top + share * height)
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box=box))


_OPERATIONS = (
    Operation(
        "brighten",
        Words("exposure", ("make the picture brighter", "brighten the photo", "it is too dark, make it brighter"),
              ("raise the brightness of the whole picture to {percent}% and keep everything else as it is",
               "increase the exposure of the photo so that it looks clearly brighter")),
        _scale, {"percent": (125, 140, 160)},
        inverse=Words("exposure", ("make the picture darker again", "take the extra light away"),
                      ("the photo is overexposed: bring its brightness back to normal",)),
        invertible=_unclipped,
    ),
    Operation(
        "darken",
        Words("exposure", ("make the picture darker", "darken the photo", "turn the brightness down"),
              ("lower the brightness of the whole picture to {percent}% and keep everything else as it is",
               "reduce the exposure of the photo so that it looks clearly darker")),
        _scale, {"percent": (50, 60, 70)},
        inverse=Words("exposure", ("make the picture brighter again", "brighten this dark photo"),
                      ("the photo is underexposed: bring its brightness back to normal",)),
    ),
    Operation(
        "more_contrast",
        Words("contrast", ("raise the contrast of the picture", "more contrast, please", "make the contrast stronger"),
              ("raise the contrast of the whole picture to {percent}%, with deeper shadows and stronger lights",)),
        _contrast, {"percent": (130, 150, 170)},
    ),
    Operation(
        "less_contrast",
        Words("contrast", ("lower the contrast of the picture", "make the contrast softer"),
              ("lower the contrast of the whole picture to {percent}%, so that it looks flat and soft",)),
        _contrast, {"percent": (45, 55, 65)},
        inverse=Words("contrast", ("give this flat picture its contrast back",),
                      ("the photo looks flat: raise its contrast until it looks natural again",)),
    ),
    Operation(
        "more_saturation",
        Words("saturation", ("make the colours more vivid", "boost the colours", "more saturation"),
              ("raise the saturation of all colours to {percent}% without touching the composition",)),
        _saturation, {"percent": (150, 170, 200)}, has_colour,
    ),
    Operation(
        "less_saturation",
        Words("saturation", ("make the colours paler", "tone the colours down"),
              ("lower the saturation of all colours to {percent}%, so that the picture looks washed out",)),
        _saturation, {"percent": (25, 35, 45)}, has_colour,
        inverse=Words("saturation", ("bring the faded colours back",),
                      ("the colours of the photo have faded: restore their natural strength",)),
    ),
    Operation(
        "warm",
        Words("warmth", ("give the picture warmer colours", "make it warmer", "warm up the tones"),
              ("shift the colours of the whole picture to warm tones, as in evening light",)),
        _tint((1.15, 1.0, 0.8)),
    ),
    Operation(
        "cool",
        Words("warmth", ("give the picture cooler colours", "make the tones colder"),
              ("shift the colours of the whole picture to cool, bluish tones",)),
        _tint((0.8, 1.0, 1.15)),
    ),
    Operation(
        "hue",
        Words("hue", ("shift all colours by a third of the colour wheel",),
              ("rotate the hue of every colour by 120 degrees: red becomes green, green becomes blue and blue becomes red",)),
        _rotate_hue, fits=has_colour,
        inverse=Words("hue", ("shift all colours back by a third of the colour wheel",),
                      ("rotate the hue of every colour back by 120 degrees: green becomes red, blue becomes green and red becomes blue",)),
    ),
    Operation(
        "greyscale",
        Words("greyscale", ("turn the picture black and white", "make it black and white", "remove all colours"),
              ("convert the photo into a black and white picture and keep its brightness",)),
        lambda pixels, amounts: _rounded(_grey(pixels)), fits=has_colour,
        inverse=Words("colourise", ("colourise this photo", "add natural colours to this black and white photo"),
                      ("turn this black and white picture into a colour photo with natural colours",)),
    ),
    Operation(
        "sepia",
        Words("sepia", ("give the picture a sepia tone", "make it look like an old sepia photo"),
              ("recolour the whole photo in brownish sepia tones, like a print from long ago",)),
        lambda pixels, amounts: _rounded(pixels.astype(np.float32) @ SEPIA.T),
    ),
    Operation(
        "negative",
        Words("negative", ("invert the colours", "turn the picture into a negative"),
              ("invert every colour of the picture, like a photographic negative",)),
        lambda pixels, amounts: 255 - pixels,
        inverse=Words("negative", ("turn this negative into a normal photo",),
                      ("this is a photographic negative: invert its colours to get the photo",)),
    ),
    Operation(
        "blur",
        Words("blur", ("blur the picture", "make the picture blurry", "put it out of focus"),
              ("apply an even blur to the whole picture, as if the camera were out of focus",)),
        _blur, {"sigma_px": (1.5, 2.0, 3.0)},
        inverse=Words("deblur", ("sharpen this blurry photo", "remove the blur"),
                      ("the photo is out of focus: restore the sharp picture",)),
    ),
    Operation(
        "sharpen",
        Words("sharpen", ("sharpen the picture", "make the details crisper"),
              ("sharpen the edges and fine details of the whole picture without changing its colours",)),
        _sharpen, {"strength": (1.0, 1.5, 2.0)},
    ),
    Operation(
        "noise",
        Words("noise", ("add film grain", "add some noise to the picture"),
              ("add strong, even grain to the whole photo, as from a film of high sensitivity",)),
        _noise, {"levels": (16.0, 24.0, 32.0)},
        inverse=Words("denoise", ("remove the noise", "denoise the photo"),
                      ("the photo is covered with grain: remove the noise and keep the details",)),
    ),
    Operation(
        "haze",
        Words("haze", ("cover the scene with haze", "make it foggy"),
              ("lay an even white haze over the whole picture, so that it fades like in fog",)),
        _haze, {"percent": (35, 45, 55)},
        inverse=Words("dehaze", ("remove the haze", "clear the fog"),
                      ("the photo is covered by a white haze: remove it and show the clear scene",)),
    ),
    Operation(
        "pixelate",
        Words("pixelate", ("pixelate the picture", "turn it into large pixels"),
              ("make the picture out of square blocks, {cells} along its longer side",)),
        _pixelate, {"cells": (16, 24, 32)},
    ),
    Operation(
        "posterise",
        Words("posterise", ("reduce the picture to a few flat colours", "posterise the photo"),
              ("reduce every colour channel to {steps} levels, so that the picture looks like a poster print",)),
        _posterise, {"steps": (3, 4, 5)},
    ),
    Operation(
        "zoom",
        Words("zoom", ("zoom into the {place}", "zoom in on the {place} of the picture"),
              ("crop to the {place} of the picture and enlarge it to {zoom_percent}%, in the same frame",)),
        _zoom, {"place": tuple(_CORNERS), "zoom_percent": (150, 200, 250)},
    ),
    Operation(
        "turn",
        Words("rotate", ("turn the picture {way} by a quarter", "rotate it 90 degrees {way}"),
              ("rotate the whole picture {way} by 90 degrees and keep its frame",)),
        _turn, {"way": ("clockwise", "anticlockwise")}, _square,
        inverse=Words("rotate", ("turn the picture back: it was turned {way} by a quarter",),
                      ("the picture was rotated 90 degrees {way}: undo that",)),
    ),
    Operation(
        "upside_down",
        Words("rotate", ("turn the picture upside down", "rotate the picture by 180 degrees"),
              ("rotate the whole picture by 180 degrees, so that it stands on its head",)),
        lambda pixels, amounts: np.ascontiguousarray(pixels[::-1, ::-1]),
        inverse=Words("rotate", ("the picture is upside down, turn it the right way up",),
                      ("the photo stands on its head: rotate it by 180 degrees",)),
    ),
    Operation(
        "mirror",
        Words("mirror", ("mirror the picture from left to right", "flip the picture horizontally"),
              ("mirror the whole picture, so that what was on the left is on the right",)),
        lambda pixels, amounts: np.ascontiguousarray(pixels[:, ::-1]),
        inverse=Words("mirror", ("the picture is mirrored, mirror it back",),
                      ("the photo is reversed left to right: mirror it back",)),
    ),
    Operation(
        "flip",
        Words("flip", ("flip the picture vertically", "mirror the picture from top to bottom"),
              ("mirror the whole picture along its horizontal axis, so that what was on top is at the bottom",)),
        lambda pixels, amounts: np.ascontiguousarray(pixels[::-1]),
        inverse=Words("flip", ("the picture is flipped vertically, flip it back",),
                      ("the photo is mirrored from top to bottom: mirror it back",)),
    ),
)  # fmt: skip

OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in _OPERATIONS}
"""Every exact operation by name. A factor below one never clips, so what it did can be undone for any source; brightening can
only where nothing was clipped."""

_ANY_WORDING = re.compile("|".join(
    re.sub(r"\\{\w+\\}", r".{1,20}", re.escape(template))
    for operation in _OPERATIONS
    for words in (operation.words, operation.inverse)
    if words is not None
    for template in (*words.short, *words.long)
))  # fmt: skip
"""Tells in microseconds that an instruction is none of these: nearly every triplet of a source is not."""
