"""What changed between two pictures of one size: where, how much, and whether the rest kept its structure.
Measures only; what they mean for an edit of some type is for the rules to say."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from scipy import ndimage

Pixels = np.ndarray  # uint8 [H, W, 3]

CHANGED_LEVELS = 12  # largest channel difference of a pixel that still counts as unchanged: JPEG and resize noise
LEAST_CHANGE = 0.004
"""Share of pixels that an edit must change to be told from nothing."""
MASK_CELLS = 8
WINDOW_PX = 7  # of the structural similarity, as in Wang et al. (2004) with a uniform window
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
SMALLEST_REGION_PX, GROWN_PX = 64, 7
"""Of an estimated mask: regions below this area are noise, the rest grows by this much. How the
authors of DreamLite make their masks is unpublished: the numbers are those of a community's plan for it."""


def difference(source: Pixels, target: Pixels) -> np.ndarray:
    """Largest channel difference of each pixel in levels, int16 [H, W]."""
    return np.abs(source.astype(np.int16) - target.astype(np.int16)).max(-1)


def smooth_difference(source: Pixels, target: Pixels) -> np.ndarray:
    """The same after a mean over 3 x 3 px, float32 [H, W]: the noise of JPEG cancels within its window, an edit does not."""
    signed = target.astype(np.float32) - source.astype(np.float32)
    return np.abs(ndimage.uniform_filter(signed, (3, 3, 1), mode="nearest")).max(-1)


def changed_pixels(source: Pixels, target: Pixels) -> np.ndarray:
    """bool [H, W]: where the pictures differ by more than CHANGED_LEVELS in any channel."""
    return difference(source, target) > CHANGED_LEVELS


def estimated_mask(changed: np.ndarray) -> np.ndarray:
    """Where an edit took place, from bool [H, W] of changed pixels: small regions dropped, the rest grown. On pictures of
    less than 256 px a side both lengths shrink in proportion."""
    scale = min(1.0, min(changed.shape) / 256)
    labels, count = ndimage.label(changed)
    if not count:
        return changed
    sizes = np.bincount(labels.ravel())
    large = sizes >= max(2, SMALLEST_REGION_PX * scale**2)
    large[0] = False
    return ndimage.binary_dilation(large[labels], iterations=max(1, round(GROWN_PX * scale)))


def regions(mask: np.ndarray, smallest_share: float = 0.002) -> int:
    """How many separate regions of at least `smallest_share` of the picture bool [H, W] has."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    return int((sizes >= smallest_share * mask.size).sum())


def similarity_map(source: Pixels, target: Pixels) -> np.ndarray:
    """Structural similarity (Wang et al., 2004) of the lumas at each pixel, float32 [H, W] in [-1, 1]."""
    first, second = (pixels.astype(np.float32) @ LUMA for pixels in (source, target))
    planes = np.stack([first, second, first**2, second**2, first * second])
    mean_first, mean_second, mean_square_first, mean_square_second, mean_product = ndimage.uniform_filter(
        planes, (1, WINDOW_PX, WINDOW_PX), mode="nearest"
    )
    variance_first, variance_second = mean_square_first - mean_first**2, mean_square_second - mean_second**2
    covariance = mean_product - mean_first * mean_second
    low, high = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * mean_first * mean_second + low) * (2 * covariance + high)) / (
        (mean_first**2 + mean_second**2 + low) * (variance_first + variance_second + high)
    )


def correlation(source: Pixels, target: Pixels, where: np.ndarray | None = None) -> float | None:
    """Size of the normalised cross-correlation of the lumas over bool [H, W] `where` (None: everywhere), in [0, 1]: 1 where
    one is a brighter, flatter or negative version of the other. None where either is flat there."""
    first, second = (pixels.astype(np.float32) @ LUMA for pixels in (source, target))
    if where is not None:
        first, second = first[where], second[where]
    if first.size < 2 or first.std() < 1 or second.std() < 1:
        return None
    return abs(float(((first - first.mean()) * (second - second.mean())).mean() / (first.std() * second.std())))


def mask_cells(changed: np.ndarray) -> bytes:
    """The edit mask: share of changed pixels of bool [H, W] in each of 8 x 8 cells, as 64 bytes of 0..255."""
    height, width = changed.shape
    rows = (np.arange(height) * MASK_CELLS) // height
    columns = (np.arange(width) * MASK_CELLS) // width
    cell = rows[:, None] * MASK_CELLS + columns[None, :]
    total = np.bincount(cell.ravel(), minlength=MASK_CELLS**2)
    hit = np.bincount(cell.ravel(), weights=changed.ravel(), minlength=MASK_CELLS**2)
    return np.rint(255 * hit / np.maximum(total, 1)).astype(np.uint8).tobytes()


def encode_mask(mask: np.ndarray) -> bytes:
    """bool [H, W] as a 1-bit PNG."""
    buffer = io.BytesIO()
    Image.fromarray(mask).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


def decode_mask(payload: bytes) -> np.ndarray:
    """The mask, bool [H, W]; a mask of more bits counts from its middle grey up."""
    with Image.open(io.BytesIO(payload), formats=("PNG",)) as image:
        return np.asarray(image.convert("L")) >= 128
