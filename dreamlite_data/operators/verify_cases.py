"""One case of a truth set: a triplet whose worth is known, and what every truth set is made from.
Photos come from the wheels; targets pass through JPEG where those of real sets do."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from dreamlite_data.operators.change import Pixels
from dreamlite_data.operators.draw import generator, pick
from dreamlite_data.operators.verify_measures import Measures
from dreamlite_data.sources.photos import PHOTOS, find_photo

PHOTO_PX = 192


@dataclasses.dataclass(frozen=True)
class Case:
    """A triplet whose worth is known: `fault` is '' for a right one, else how it was spoilt. `mask` is where the edit
    belongs, where that is known; `given` are the measures that another operator would take of it."""

    origin: str
    edit_type: str
    instruction: str
    source: Pixels
    target: Pixels
    fault: str = ""
    mask: np.ndarray | None = None
    given: Measures = dataclasses.field(default_factory=dict)


def truth_photos(count: int, seed: int) -> Iterator[tuple[str, Pixels]]:
    """`count` square crops of the photos in the wheels, PHOTO_PX a side, each with an id that draws may use."""
    files = [path for place, name, words, _ in PHOTOS if words and (path := find_photo(place, name)) is not None]
    for number in range(count):
        rng = generator("truth photo", seed, number)
        with Image.open(files[(number + seed) % len(files)]) as image:
            whole = image.convert("RGB")
        side = int(min(whole.size) * rng.uniform(0.5, 1.0))
        left, top = (int(rng.integers(0, length - side + 1)) for length in whole.size)
        crop = whole.crop((left, top, left + side, top + side)).resize((PHOTO_PX, PHOTO_PX), Image.Resampling.LANCZOS)
        yield f"truth-{seed}-{number}", np.array(crop)


def through_jpeg(pixels: Pixels, quality: int) -> Pixels:
    """What is left of the picture after JPEG without colour subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
    return np.array(Image.open(buffer))


def shuffled_blocks(pixels: Pixels, image_id: str) -> Pixels:
    """The picture with its quarters in another order: every colour is kept, nothing is where it was."""
    middle_y, middle_x = pixels.shape[0] // 2, pixels.shape[1] // 2
    shift = pick(((middle_y, middle_x), (0, middle_x), (middle_y, 0)), "blocks", image_id)
    return np.roll(pixels, shift, axis=(0, 1))
