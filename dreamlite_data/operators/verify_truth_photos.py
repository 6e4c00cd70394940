"""Truth sets of whole photos and of words in them: styles that are made exactly, and text that is drawn onto a photo.
Right edits, and the same spoilt in known ways, as in verify_truth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dreamlite_data.operators.change import LEAST_CHANGE, Pixels, changed_pixels
from dreamlite_data.operators.draw import generator, pick, shuffled
from dreamlite_data.operators.exact import OPERATIONS
from dreamlite_data.operators.verify_cases import Case, shuffled_blocks, through_jpeg

STYLE_WORDS = {
    "greyscale": ("turn the picture into a black and white photo", "make it black and white"),
    "sepia": ("give the picture a sepia tone", "make it look like an old sepia photo"),
    "negative": ("turn the picture into a negative", "invert the colours, like a photographic negative"),
    "posterise": ("posterise the photo", "make the picture look like a poster print of few flat colours"),
    "pixelate": ("pixelate the picture", "turn it into pixel art"),
}
SIGN_WORDS = ("OPEN", "SALE", "EXIT", "HOTEL", "BREAD", "MUSIC", "GARDEN", "STATION", "MARKET", "COFFEE", "BRIDGE", "WINTER")
TEXT_PX = 320
"""Signs are drawn on photos of this size, so that a reader of text can read them."""


def style_truth(photos: Iterable[tuple[str, Pixels]], jpeg_quality: int = 92) -> Iterator[Case]:
    """Each style on each photo, right and spoilt: nothing done, another style, or the right one of a picture whose parts changed
    their places."""
    for image_id, photo in photos:
        for style, forms in STYLE_WORDS.items():
            if not OPERATIONS[style].fits(photo):
                continue
            words = pick(forms, "truth style", style, image_id)
            target = OPERATIONS[style](photo, image_id)
            if changed_pixels(photo, target).mean() < LEAST_CHANGE:
                continue  # what shows no difference is no edit, as in the other truth sets
            other = pick([name for name in STYLE_WORDS if name != style], "other style", style, image_id)
            targets = {
                "": target, "no_op": photo, "wrong_value": OPERATIONS[other](photo, image_id), "over_edit": shuffled_blocks(target, image_id),
            }  # fmt: skip
            for fault, pixels in targets.items():
                yield Case("style", "style", words, photo, through_jpeg(pixels, jpeg_quality), fault)


def text_truth(photos: Iterable[tuple[str, Pixels]], jpeg_quality: int = 92) -> Iterator[Case]:
    """A sign on each photo whose words are replaced, removed or added, right and spoilt: nothing done, other words, or something
    else changed as well. `mask` is the sign."""
    for image_id, photo in photos:
        photo = np.asarray(Image.fromarray(photo).resize((TEXT_PX, TEXT_PX), Image.Resampling.LANCZOS))
        old, new, wrong = shuffled(SIGN_WORDS, "signs", image_id)[:3]
        for kind, before, after, words in (
            ("replace", old, new, f'replace the word "{old}" with "{new}"'),
            ("remove", old, "", f'remove the word "{old}" from the sign'),
            ("add", "", new, f'write "{new}" on the sign'),
        ):
            source, mask = _sign(photo, before, image_id, kind)
            target, _ = _sign(photo, after, image_id, kind)
            misspelt, _ = _sign(photo, wrong, image_id, kind)
            spilt = np.where(mask[..., None], target, np.clip(target.astype(np.float32) * (1.18, 1.0, 0.82), 0, 255).astype(np.uint8))
            for fault, pixels in {"": target, "no_op": source, "wrong_value": misspelt, "spill": spilt}.items():
                yield Case("text", f"text_{kind}", words, source, through_jpeg(pixels, jpeg_quality), fault, mask)


def _sign(photo: Pixels, word: str, image_id: str, kind: str) -> tuple[Pixels, np.ndarray]:
    """`photo` with a white board that says `word`, and where the board is, bool [H, W]."""
    rng = generator("sign", image_id, kind)
    image = Image.fromarray(photo)
    width, height = int(rng.integers(190, 250)), int(rng.integers(52, 72))
    left, top = int(rng.integers(8, TEXT_PX - width - 8)), int(rng.integers(8, TEXT_PX - height - 8))
    ink = tuple(int(level) for level in rng.integers(0, 90, 3))
    draw = ImageDraw.Draw(image)
    draw.rectangle((left, top, left + width, top + height), fill=(240, 238, 232))
    if word:
        draw.text((left + width / 2, top + height / 2), word, fill=ink, font=ImageFont.load_default(size=34), anchor="mm")
    mask = np.zeros(photo.shape[:2], bool)
    mask[top : top + height + 1, left : left + width + 1] = True
    return np.asarray(image), mask
