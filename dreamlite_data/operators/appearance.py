"""How an image looks, from one decode and with no model: two hashes, sharpness, exposure, contrast, entropy, colour.
Of each image only small samples are kept (`Appearance.add`); the arithmetic then runs over many images at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import xxhash
from scipy import fft

SAMPLE_PX = 96 * 96
"""Statistics of values come from at most so many pixels on a regular grid. Pixels are picked, not averaged, for means would
narrow the histogram. 9216 draws bias the entropy of 256 levels by 255 / (2 ln 2 * 9216) = 0.02 bits (Miller, 1955)."""
TILE_PX = 64
TILES = 3
"""Sharpness is judged at full resolution in the tiles with the steepest steps; an image of 64 x 64 px is one tile."""
CELL_PX = 4
STEEPEST_SHARE = 0.02
STRONG_SHARE = 0.4
HASH_SIDE_PX = 32
HASH_FREQUENCIES = 8
HASH_ROWS_PER_CELL = 8
DARK_LEVEL, LIGHT_LEVEL = 32, 223
CLIPPED_LEVELS = 2
BATCH = 16
"""Images per round of arithmetic: so many stay in the second-level cache."""

RECIPE = {
    "sample_px": SAMPLE_PX, "tile_px": TILE_PX, "tiles": TILES, "cell_px": CELL_PX, "steepest_share": STEEPEST_SHARE,
    "strong_share": STRONG_SHARE, "hash_side_px": HASH_SIDE_PX, "hash_rows_per_cell": HASH_ROWS_PER_CELL,
    "dark_level": DARK_LEVEL, "light_level": LIGHT_LEVEL, "pixel_hash": "xxh3_128",
}  # fmt: skip
"""Everything that changes a value: part of the version of the rows."""

LUMA_256 = (77, 150, 29)  # ITU-R BT.601 in 256ths: a sum of three fits 16 bits, so every machine finds the same level
_LUMA = (np.array(LUMA_256) / 256).astype(np.float32)


class TooSmall(ValueError):
    """An image without two pixels in each direction has no step and no texture."""


def pixel_hash(pixels: np.ndarray) -> str:
    """128-bit identity of uint8 [H, W, 3] in hex: XXH3 over the pixels, seeded with the shape.

    That two of 1e9 pictures meet by accident has a chance of 1e18 / 2^129 = 1.5e-21, and it costs a tenth of a sha256. XXH3
    withstands accidents, not intent: `Appearance.measures` therefore appends the perceptual hash, and whoever forges a pair
    has made at most the near-duplicate for which it will be taken.
    """
    height, width = pixels.shape[:2]
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(pixels), seed=(width << 32) | height)


class Appearance:
    """Gathers images one by one while their pixels are at hand; `measures` answers for all of them, in their order."""

    def __init__(self) -> None:
        self._hashes: list[str] = []
        self._waiting: list[tuple[np.ndarray, ...]] = []
        self._done: list[dict[str, np.ndarray]] = []

    def add(self, pixels: np.ndarray) -> None:
        """Take uint8 [H, W, 3]. Raises TooSmall below 2 x 2 px."""
        if min(pixels.shape[:2]) < 2:
            raise TooSmall(f"{pixels.shape[1]} x {pixels.shape[0]} px is too small to measure")
        sample = sample_of(pixels)
        self._waiting.append((sample.reshape(3, -1), cell_means(pixels), tiles(pixels, sample[1])))
        self._hashes.append(pixel_hash(pixels))
        if len(self._waiting) == BATCH:
            self._flush()

    def measures(self) -> dict[str, np.ndarray | list[str]]:
        """The columns of `op_quality` for every image added, each of length N."""
        self._flush()
        columns = {name: np.concatenate([part[name] for part in self._done]) for name in self._done[0]} if self._done else {}
        names = [f"{pixels}{look:016x}" for pixels, look in zip(self._hashes, columns.get("phash", np.zeros(0)).tolist(), strict=True)]
        return {"pixel_hash": names, **columns}

    def _flush(self) -> None:
        if not self._waiting:
            return
        samples, means, tile_stacks = zip(*self._waiting, strict=True)
        self._waiting = []
        self._done.append({"phash": phash(np.stack(means)), "sharpness": _sharpness_of_all(tile_stacks), **values(samples)})


# --- samples of one image ----------------------------------------------------------------------------------------------


def sample_of(pixels: np.ndarray) -> np.ndarray:
    """The pixels of the sample grid, uint8 [3, h, w], channel by channel so that what follows runs over whole lines."""
    height, width = pixels.shape[:2]
    step = max(1, math.ceil(math.sqrt(height * width / SAMPLE_PX)))
    grid = pixels[step // 2 :: step, step // 2 :: step]
    planes = np.empty((3, *grid.shape[:2]), np.uint8)
    for channel in range(3):
        planes[channel] = grid[..., channel]
    return planes


def tiles(pixels: np.ndarray, green: np.ndarray) -> np.ndarray:
    """The up to TILES tiles with the steepest steps of the sampled `green`: uint8 [TILE_PX, T * 3, TILE_PX], lines first and
    then the planes of each tile, so that work on lines runs through memory. An image that is smaller than a tile is
    continued by its border pixels."""
    height, width = pixels.shape[:2]
    if height < TILE_PX or width < TILE_PX:
        missing = [max(0, TILE_PX - side) for side in (height, width)]
        pixels = np.pad(pixels, [*((part // 2, part - part // 2) for part in missing), (0, 0)], mode="edge")
        height, width = pixels.shape[:2]
    down, across = max(1, round(height / TILE_PX)), max(1, round(width / TILE_PX))
    places = range(down * across)
    if len(places) > TILES:
        steps = _steps(green)
        lines = np.maximum.reduceat(steps, np.arange(across) * green.shape[1] // across, axis=1)
        steepest = np.maximum.reduceat(lines, np.arange(down) * green.shape[0] // down, axis=0)
        places = sorted(np.argsort(255 - steepest.ravel(), kind="stable")[:TILES].tolist())
    found = np.empty((len(places), TILE_PX, TILE_PX, 3), np.uint8)
    for tile, place in zip(found, places, strict=True):
        top = min(place // across * height // down, height - TILE_PX)
        left = min(place % across * width // across, width - TILE_PX)
        tile[:] = pixels[top : top + TILE_PX, left : left + TILE_PX]
    return np.ascontiguousarray(found.transpose(1, 0, 3, 2)).reshape(TILE_PX, len(places) * 3, TILE_PX)


def cell_means(pixels: np.ndarray) -> np.ndarray:
    """Mean luma of HASH_SIDE_PX x HASH_SIDE_PX equal cells, float32. Columns are averaged by area; of its rows each cell
    takes up to HASH_ROWS_PER_CELL at equal distances."""
    height, width = pixels.shape[:2]
    per_cell = min(HASH_ROWS_PER_CELL, max(1, height // HASH_SIDE_PX))
    count = HASH_SIDE_PX * per_cell
    picked = pixels.reshape(height, width * 3)[(2 * np.arange(count) + 1) * height // (2 * count)]
    sums = np.add.reduce(picked.reshape(HASH_SIDE_PX, per_cell, width * 3), axis=1, dtype=np.uint16)
    luma = (sums.reshape(HASH_SIDE_PX * width, 3).astype(np.float32) @ _LUMA).reshape(HASH_SIDE_PX, width)
    if width < HASH_SIDE_PX:
        luma, width = np.repeat(luma, HASH_SIDE_PX, axis=1), width * HASH_SIDE_PX
    edges = np.arange(HASH_SIDE_PX + 1) * width
    whole = edges // HASH_SIDE_PX
    means = np.add.reduceat(luma, whole[:-1], axis=1)
    if width % HASH_SIDE_PX:  # a column that an edge cuts belongs to both cells, by area
        cut = luma[:, np.minimum(whole, width - 1)] * (edges % HASH_SIDE_PX / HASH_SIDE_PX).astype(np.float32)
        means += cut[:, 1:] - cut[:, :-1]
    return means * np.float32(HASH_SIDE_PX / (width * per_cell))


# --- arithmetic over many images ---------------------------------------------------------------------------------------


def phash(means: np.ndarray) -> np.ndarray:
    """64-bit perceptual hash of cell means [N, 32, 32], as uint64 [N]: sign of the 8 x 8 lowest frequencies against their
    median (the DCT hash of Zauner, 2010)."""
    low = fft.dctn(means, axes=(1, 2), norm="ortho")[:, :HASH_FREQUENCIES, :HASH_FREQUENCIES].reshape(len(means), -1)
    # Rounding keeps a flat image, whose coefficients are all noise, at one hash on every machine.
    low = np.round(low, 2)
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8").reshape(-1).astype(np.uint64)


def _sharpness_of_all(stacks: Sequence[np.ndarray]) -> np.ndarray:
    """`sharpness` of images with any number of tiles: those with equally many go together."""
    answer = np.zeros(len(stacks), np.float32)
    widths = np.array([stack.shape[1] for stack in stacks])
    for width in np.unique(widths):
        where = np.flatnonzero(widths == width)
        answer[where] = sharpness(np.concatenate([stacks[index] for index in where], axis=1), len(where))
    return answer


def sharpness(lines: np.ndarray, count: int) -> np.ndarray:
    """How steep the steepest edges are, in [0, 1], of `count` images in uint8 [S, count * T * 3, S]: the largest step between
    neighbouring pixels as a share of the contrast around it. A clean edge crosses its contrast in one or two pixels (0.5 to
    1); after a Gaussian blur of sigma s the steepest step is 1 / (s sqrt(2 pi)) of it. Contrast cancels, so dim is not blurred.

    Steps are taken per cell of CELL_PX, contrast over the 3 x 3 cells around, in each colour by itself: two colours of one
    brightness have an edge too. The outermost cells only lend contrast, for an edge that is cut off looks steeper than it is.
    """
    side, planes, _ = lines.shape
    flat = lines.reshape(side, planes * side)  # differences across planes fall into outermost cells
    highest, lowest = _cells(flat, planes, np.maximum), _cells(flat, planes, np.minimum)
    spread = _around(highest, np.maximum) - _around(lowest, np.minimum)
    peak = _cells(_steps(flat), planes, np.maximum)[1:-1, :, 1:-1]

    def by_image(cells: np.ndarray) -> np.ndarray:  # [C, planes, C] -> [count, 3, cells]
        tiled = cells.reshape(cells.shape[0], count, -1, 3, cells.shape[2])
        return tiled.transpose(1, 3, 2, 0, 4).reshape(count, 3, -1).astype(np.float32)

    spread, peak = by_image(spread), by_image(peak)
    largest = spread.max((1, 2), keepdims=True)
    ratios = np.where(spread > STRONG_SHARE * largest, peak / np.maximum(spread, 1), -1).max(1)
    ratios.sort(axis=1)
    strong = (ratios >= 0).sum(1)
    kept = np.minimum(np.maximum(4, (STEEPEST_SHARE * strong).astype(np.int64)), np.maximum(1, strong))
    first, images = ratios.shape[1] - kept, np.arange(count)
    median = (ratios[images, first + (kept - 1) // 2] + ratios[images, first + kept // 2]) / 2
    return np.where(largest[:, 0, 0] < 4, 0, median).astype(np.float32)  # below four levels there is noise and no edge


def _steps(values: np.ndarray) -> np.ndarray:
    """Largest difference of each value to its right and its lower neighbour; uint8 [H, W] in and out."""
    steps = np.empty_like(values)
    left, right = values[:, :-1], values[:, 1:]
    np.subtract(np.maximum(left, right), np.minimum(left, right), out=steps[:, :-1])
    steps[:, -1] = 0
    upper, lower = values[:-1], values[1:]
    np.maximum(steps[:-1], np.maximum(upper, lower) - np.minimum(upper, lower), out=steps[:-1])
    return steps


def _cells(flat: np.ndarray, planes: int, pick: np.ufunc) -> np.ndarray:
    """`pick` (np.maximum or np.minimum) over cells of CELL_PX x CELL_PX: [S, planes * S] -> [S / 4, planes, S / 4]."""
    side = len(flat)
    rows = pick.reduce(flat.reshape(side // CELL_PX, CELL_PX, -1), axis=1)
    columns = pick(pick(rows[:, 0::4], rows[:, 1::4]), pick(rows[:, 2::4], rows[:, 3::4]))
    return columns.reshape(side // CELL_PX, planes, side // CELL_PX)


def _around(cells: np.ndarray, pick: np.ufunc) -> np.ndarray:
    """`pick` over the 3 x 3 cells around each inner cell: [C, planes, C] -> [C - 2, planes, C - 2]."""
    rows = pick(pick(cells[:-2], cells[1:-1]), cells[2:])
    return pick(pick(rows[..., :-2], rows[..., 1:-1]), rows[..., 2:])


def values(samples: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Exposure and colour of samples uint8 [3, n], each of its own n. Sums are of whole numbers: exact in any order."""
    counts = np.array([sample.shape[1] for sample in samples])
    starts = np.cumsum(counts) - counts
    together = np.concatenate(samples, axis=1).astype(np.int16)
    red, green, blue = together
    wide = together.view(np.uint16)
    luma = (wide[0] * LUMA_256[0] + wide[1] * LUMA_256[1] + wide[2] * LUMA_256[2] + 128) >> 8
    image = np.repeat(np.arange(len(samples)) * 256, counts)
    histogram = np.bincount(luma + image, minlength=256 * len(samples)).reshape(len(samples), 256)
    sums = []
    for difference in (red - green, red + green - 2 * blue):
        square = difference.astype(np.int32) ** 2
        sums += [np.add.reduceat(difference, starts, dtype=np.int64), np.add.reduceat(square, starts, dtype=np.int64)]
    return {**_exposure(histogram), "colourfulness": _colourfulness(counts, *sums)}


def _exposure(histogram: np.ndarray) -> dict[str, np.ndarray]:
    """What the luma histogram [N, 256] tells: mean and spread in [0, 1], entropy in bits, and the shares of pixels that are
    dark, light, and without any detail because they lie at an end of the scale."""
    count = histogram.sum(1)
    share = histogram / count[:, None]
    levels = np.arange(256)
    mean, square = histogram @ levels / count, histogram @ levels**2 / count  # whole numbers: exact in any order
    return {
        "brightness": mean / 255,
        "contrast": np.sqrt(np.maximum(0, square - mean**2)) / 255,
        "entropy_bits": -(share * np.log2(np.where(share > 0, share, 1))).sum(1) + 0.0,
        "dark_fraction": histogram[:, :DARK_LEVEL].sum(1) / count,
        "light_fraction": histogram[:, LIGHT_LEVEL + 1 :].sum(1) / count,
        "clipped_fraction": (histogram[:, :CLIPPED_LEVELS].sum(1) + histogram[:, -CLIPPED_LEVELS:].sum(1)) / count,
    }


def _colourfulness(
    count: np.ndarray, red_green: np.ndarray, red_green_squares: np.ndarray, yellow_blue: np.ndarray, yellow_blue_squares: np.ndarray
) -> np.ndarray:
    """The metric of Hasler and Suesstrunk (2003), eq. M3, from the sums and sums of squares of red - green and of twice the
    yellow-blue difference, each [N]."""
    means = np.stack([red_green / count, yellow_blue / count / 2])
    variances = np.stack([red_green_squares / count, yellow_blue_squares / count / 4]) - means**2
    return np.sqrt(np.maximum(0, variances).sum(0)) + 0.3 * np.hypot(*means)
