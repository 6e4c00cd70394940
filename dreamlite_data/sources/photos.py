"""Export the photos that lie in the scikit-image and scikit-learn wheels as an image folder with captions.
They are the second default source: real pictures, real oddities (grey, palette, 16 frames), and nothing to download."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from pathlib import Path

from PIL import Image, UnidentifiedImageError

# Where, file, caption (None: it ships without words and has to end as a row that says so), licence.
_SKIMAGE_LICENCE = "see skimage/data/README.txt and the scikit-image gallery"
PHOTOS: tuple[tuple[str, str, str | None, str], ...] = (
    ("skimage/data", "astronaut.png", "a smiling astronaut in an orange space suit in front of a flag", "public domain (NASA)"),
    ("skimage/data", "brick.png", "a wall of grey bricks", "CC0-1.0"),
    ("skimage/data", "camera.png", "a man in a coat looking through a camera on a tripod", "CC0-1.0"),
    ("skimage/data", "cell.png", "a single cell under a microscope", "CC0-1.0"),
    ("skimage/data", "chelsea.png", "the face of a tabby cat", "CC0-1.0"),
    ("skimage/data", "clock_motion.png", "a blurred clock face", "public domain"),
    ("skimage/data", "coffee.png", "a cup of espresso on a saucer with a spoon", "CC0-1.0"),
    ("skimage/data", "coins.png", "rows of old coins on a dark ground", _SKIMAGE_LICENCE),
    ("skimage/data", "color.png", None, _SKIMAGE_LICENCE),
    ("skimage/data", "grass.png", "a lawn of grass seen from above", "CC0-1.0"),
    ("skimage/data", "gravel.png", "small stones of gravel seen from above", "CC0-1.0"),
    ("skimage/data", "horse.png", "the silhouette of a horse", _SKIMAGE_LICENCE),
    ("skimage/data", "hubble_deep_field.jpg", "many distant galaxies against black space", "public domain (NASA)"),
    ("skimage/data", "ihc.png", "stained tissue under a microscope", _SKIMAGE_LICENCE),
    ("skimage/data", "logo.png", None, "BSD-3-Clause"),
    ("skimage/data", "moon.png", "craters on the surface of the moon", "public domain"),
    ("skimage/data", "motorcycle_left.png", "a motorcycle in a workshop", _SKIMAGE_LICENCE),
    ("skimage/data", "motorcycle_right.png", "a motorcycle in a workshop", _SKIMAGE_LICENCE),
    ("skimage/data", "multipage_rgb.tif", None, "BSD-3-Clause"),
    ("skimage/data", "no_time_for_that_tiny.gif", None, _SKIMAGE_LICENCE),
    ("skimage/data", "page.png", "a printed page of text in uneven light", _SKIMAGE_LICENCE),
    ("skimage/data", "retina.jpg", "the retina of a human eye", "public domain"),
    ("skimage/data", "rocket.jpg", "a rocket on its launch pad against the sky", "public domain"),
    ("skimage/data", "text.png", "a line of handwritten text", _SKIMAGE_LICENCE),
    ("sklearn/datasets/images", "china.jpg", "a chinese temple with a golden roof under a cloudy sky", "CC-BY-2.0"),
    ("sklearn/datasets/images", "flower.jpg", "a pink dahlia flower against dark green leaves", "CC-BY-2.0"),
)


def export(folder: Path, max_px: int) -> int:
    """Write the photos below `folder`, at most `max_px` px on the longer side, each with a .json of its licence and, where
    words are known, a .txt. A file that fits is copied byte for byte. Returns how many; a wheel without its files is passed over."""
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for place, name, words, licence in PHOTOS:
        path = find_photo(place, name)
        if path is None:
            continue
        target = folder / name
        try:
            with Image.open(path) as image:
                fits = max(image.size) <= max_px
                if not fits:
                    _write_smaller(image, target, max_px)
        except UnidentifiedImageError:
            fits = True  # what Pillow cannot read goes out as it is: ingest has to say so
        if fits:
            shutil.copyfile(path, target)
        if words:
            target.with_suffix(".txt").write_text(words + "\n", encoding="utf-8")
        target.with_suffix(".json").write_text(json.dumps({"licence": licence}) + "\n", encoding="utf-8")
        written += 1
    return written


def find_photo(place: str, name: str) -> Path | None:
    """The file `name` of the installed package folder `place`, e.g. ("skimage/data", "coffee.png"); None where it is not."""
    package, _, below = place.partition("/")
    spec = importlib.util.find_spec(package)  # finds the folder without importing the package
    for root in spec.submodule_search_locations or () if spec else ():
        path = Path(root) / below / name
        if path.is_file():
            return path
    return None


def _write_smaller(image: Image.Image, target: Path, max_px: int) -> None:
    if image.mode not in ("RGB", "RGBA", "L"):
        image = image.convert("RGB")
    scale = max_px / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    buffer = io.BytesIO()
    smaller = image.resize(size, Image.Resampling.LANCZOS)
    if target.suffix == ".jpg":
        smaller.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        smaller.save(buffer, "PNG", compress_level=6)
    target.write_bytes(buffer.getvalue())
