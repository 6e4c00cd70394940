"""Cut-outs: pictures of single things with an alpha channel and a name, from a folder of PNG files or drawn here.
Files are judged by their header when listed, and decoded only when drawn for a picture."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import re
import warnings
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, UnidentifiedImageError

from dreamlite_data.operators.wording import COLOURS
from dreamlite_data.sources.base import DigestCache

MIN_SIDE_PX, MAX_SIDE_PX = 48, 4096
MAX_NAME_WORDS = 4
MAX_CAPTION_BYTES = 65536
_ENDS_NAME = frozenset("with of in on at for from to by and or that which who is was are over under near like used".split())
MOST_OPAQUE = 0.97  # of the file: a rectangle that is all opaque is a picture, not a cut-out
LEAST_OPAQUE = 0.08  # of what shows: below, it is a thread or a smudge
DRAWN_PX = 128


class CutOutError(ValueError):
    """A cut-out or a folder of them cannot be used; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class CutOut:
    """A thing that can be pasted. `noun` is its name without article and colour, `colour` the name of its colour where
    one word says it."""

    cutout_id: str
    noun: str
    colour: str | None = None

    @property
    def name(self) -> str:
        """Noun phrase: "red star", "male lion"."""
        return f"{self.colour} {self.noun}" if self.colour else self.noun


class CutOuts(Protocol):
    """A set of cut-outs. `digest` names its content; `pixels` gives straight RGBA, uint8 [H, W, 4], cropped to what shows.
    It raises CutOutError for a file that turns out broken. `content_id` names a cut-out wherever it lies."""

    digest: str
    items: tuple[CutOut, ...]

    def pixels(self, item: CutOut) -> np.ndarray: ...

    def content_id(self, item: CutOut) -> str: ...


# --- from a folder ---------------------------------------------------------------------------------------------------


class CutOutFolder:
    """PNG files with alpha below a folder, each named by the .txt beside it (first line, as tuxpaint's stamps do) or by
    its file name. Files that are none are passed over with one warning."""

    def __init__(self, path: Path | str, digest: str) -> None:
        self.root, self.digest = Path(path), digest
        found, refused = [], []
        for file in png_files(self.root):
            try:
                found.append(CutOut(str(file.relative_to(self.root)), *_named(file)))
            except CutOutError as error:
                refused.append(f"{file.relative_to(self.root)}: {error}")
        if not found:
            why = f"; the first of {len(refused)} refused is {refused[0]}" if refused else ""
            raise CutOutError(f"no cut-outs below {self.root}: refresh.composite.cutouts wants PNG files with transparency{why}")
        if refused:
            warnings.warn(f"{len(refused)} of {len(refused) + len(found)} PNG files below {self.root} are no cut-outs: {refused[0]}", stacklevel=2)
        self.items = tuple(found)

    def pixels(self, item: CutOut) -> np.ndarray:
        return _decode(self.root / item.cutout_id)

    def content_id(self, item: CutOut) -> str:
        """sha256 of the file."""
        return _sha256(self.root / item.cutout_id)


def png_files(root: Path) -> list[Path]:
    """The PNG files below `root` that really lie there: links that lead out of it do not count. Sorted by name."""
    if not root.is_dir():
        raise CutOutError(f"there is no folder of cut-outs at {root}: correct refresh.composite.cutouts")
    inside = root.resolve()
    return sorted(file for file in root.rglob("*.png") if file.is_file() and file.resolve().is_relative_to(inside))


def folder_digest(root: Path, digests: DigestCache) -> str:
    """One digest over names and content of the cut-outs and their captions."""
    parts = (part for file in png_files(root) for part in (file, file.with_suffix(".txt")))
    return digests.of_files(root, (part for part in parts if part.is_file()))[:16]


def _named(file: Path) -> tuple[str, str | None]:
    try:
        with Image.open(file, formats=("PNG",)) as image:
            size, alpha = image.size, image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise CutOutError(f"not a readable PNG ({error})") from None
    if not alpha:
        raise CutOutError("no alpha channel")
    if not (min(size) >= MIN_SIDE_PX and max(size) <= MAX_SIDE_PX):
        raise CutOutError(f"{size[0]} x {size[1]} px is outside {MIN_SIDE_PX} to {MAX_SIDE_PX} px a side")
    return _name_in(file)


def _name_in(file: Path) -> tuple[str, str | None]:
    """Noun and colour from the caption's first line: the noun phrase that it begins with. Only a file with no caption is
    named by its own name."""
    caption = file.with_suffix(".txt")
    if caption.is_file() and caption.stat().st_size < MAX_CAPTION_BYTES:
        line = caption.read_text(encoding="utf-8", errors="replace").partition("\n")[0].lower()
        match = re.match(r"\s*(?:an?|the) ([a-z' -]+)", line)
        words = match[1].split() if match else []
        words = list(itertools.takewhile(lambda word: not (word in _ENDS_NAME or word.endswith("ing")), words))
    else:
        words = re.findall(r"[a-z]+", file.stem.lower())
    if not 1 <= len(words) <= MAX_NAME_WORDS:
        raise CutOutError("neither its caption nor its file name says in a few words what it is")
    colour = words[0] if words[0] in COLOURS and len(words) > 1 else None
    return " ".join(words[1:] if colour else words), colour


@functools.lru_cache(maxsize=4096)
def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@functools.lru_cache(maxsize=256)
def _decode(file: Path) -> np.ndarray:
    try:
        with Image.open(file, formats=("PNG",)) as image:
            pixels = np.array(image.convert("RGBA"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CutOutError(f"{file}: {error}") from None
    shown = pixels[..., 3] > 0
    if not shown.any():
        raise CutOutError(f"{file}: nothing of it shows")
    opaque = float((pixels[..., 3] > 127).mean())
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if opaque > MOST_OPAQUE or float((pixels[..., 3] > 127).mean()) < LEAST_OPAQUE:
        raise CutOutError(f"{file}: {opaque:.0%} of it is opaque, a cut-out has {LEAST_OPAQUE:.0%} to {MOST_OPAQUE:.0%}")
    return pixels


# --- drawn -----------------------------------------------------------------------------------------------------------


def _polygon(count: int, inner: float, turn: float = 0.0) -> list[tuple[float, float]]:
    """Corners of a regular polygon or star around (0.5, 0.5); `inner` is the radius of every second corner."""
    radii = (0.48, 0.48 * inner)
    return [
        (0.5 + radii[index % 2] * math.sin(math.pi * index / count + turn), 0.5 - radii[index % 2] * math.cos(math.pi * index / count + turn))
        for index in range(2 * count)
    ]


def _heart() -> list[tuple[float, float]]:
    angles = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    across = 16 * np.sin(angles) ** 3
    down = 13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles)
    return [(0.5 + 0.029 * x, 0.47 - 0.029 * y) for x, y in zip(across, down, strict=True)]


_SHAPES: dict[str, list[tuple[float, float]]] = {
    "star": _polygon(5, 0.42),
    "heart": _heart(),
    "diamond": [(0.5, 0.02), (0.84, 0.5), (0.5, 0.98), (0.16, 0.5)],
    "arrow": [(0.02, 0.36), (0.55, 0.36), (0.55, 0.12), (0.98, 0.5), (0.55, 0.88), (0.55, 0.64), (0.02, 0.64)],
    "sun": _polygon(12, 0.72),
    "house": [(0.5, 0.03), (0.97, 0.45), (0.84, 0.45), (0.84, 0.97), (0.16, 0.97), (0.16, 0.45), (0.03, 0.45)],
    "flower": [(0.5 + (0.36 + 0.12 * math.cos(6 * a)) * math.sin(a), 0.5 - (0.36 + 0.12 * math.cos(6 * a)) * math.cos(a))
               for a in np.linspace(0, 2 * np.pi, 120, endpoint=False)],
    "hexagon": _polygon(6, 0.866),
    "ball": [(0.5 + 0.47 * math.sin(a), 0.5 - 0.47 * math.cos(a)) for a in np.linspace(0, 2 * np.pi, 90, endpoint=False)],
    "cross": [(0.36, 0.03), (0.64, 0.03), (0.64, 0.36), (0.97, 0.36), (0.97, 0.64), (0.64, 0.64), (0.64, 0.97), (0.36, 0.97), (0.36, 0.64),
              (0.03, 0.64), (0.03, 0.36), (0.36, 0.36)],
    "balloon": [(0.5 + 0.36 * math.sin(a), 0.42 - 0.4 * math.cos(a)) for a in np.linspace(-2.75, 2.75, 60)]
               + [(0.53, 0.87), (0.57, 0.97), (0.43, 0.97), (0.47, 0.87)],
    "bell": [(0.5, 0.04), (0.66, 0.12), (0.74, 0.36), (0.79, 0.66), (0.94, 0.82), (0.06, 0.82), (0.21, 0.66), (0.26, 0.36), (0.34, 0.12)],
}  # fmt: skip


class DrawnCutOuts:
    """Shaded shapes in every colour of the vocabulary: what is there with no files at all."""

    digest = "drawn-1"

    def __init__(self) -> None:
        self.items = tuple(CutOut(f"drawn/{shape}/{colour}", shape, colour) for shape in _SHAPES for colour in COLOURS)

    def pixels(self, item: CutOut) -> np.ndarray:
        return _drawn(item.noun, str(item.colour))

    def content_id(self, item: CutOut) -> str:
        """Its name: the digest of this module's drawings says the rest."""
        return item.cutout_id


@functools.lru_cache(maxsize=512)
def _drawn(shape: str, colour: str) -> np.ndarray:
    """A shape with light from above, a darker rim and a soft edge."""
    big = 4 * DRAWN_PX
    outline = Image.new("L", (big, big))
    ImageDraw.Draw(outline).polygon([(x * big, y * big) for x, y in _SHAPES[shape]], fill=255)
    alpha = np.asarray(outline.resize((DRAWN_PX, DRAWN_PX), Image.Resampling.BOX), dtype=np.float32)
    inside = np.asarray(Image.fromarray(alpha.astype(np.uint8)).filter(ImageFilter.GaussianBlur(5)), dtype=np.float32) / 255
    down = np.linspace(1.12, 0.82, DRAWN_PX, dtype=np.float32)[:, None]
    shade = down * (0.62 + 0.38 * np.clip((inside - 0.5) / 0.35, 0, 1))
    pixels = np.array(COLOURS[colour], np.float32) * shade[..., None]
    shown = alpha > 0
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    drawn = np.dstack([np.clip(np.rint(pixels), 0, 255), np.rint(alpha)]).astype(np.uint8)
    return drawn[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
