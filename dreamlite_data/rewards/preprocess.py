"""Images to patches as Qwen2-VL wants them: an exact PIL path for datasets and a differentiable tensor path.
Own code, because the library's processors need torchvision and stop gradients."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

Image.init()  # registers every reader of this Pillow; which ones it was built with differs
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF") if name in Image.OPEN)
"""Formats whose readers are pure parsers. Not imported from `images`, or a change of ingest would retrain what uses rewards."""

HIGHEST_ASPECT = 200
LOWEST_VALUE, HIGHEST_VALUE = -0.5, 1.5
"""Outside of these a tensor is surely not in [0, 1]; HPSv3's own code wants 0..255, and mixing them up shifts the score."""


def smart_resize(height: int, width: int, factor: int, min_px: int, max_px: int) -> tuple[int, int]:
    """(height, width) as multiples of `factor` with an area between `min_px` and `max_px`: floor when too large,
    ceil when too small (Qwen2-VL's rule; HPSv3 sets both bounds to 200,704). Raises ValueError above aspect 200."""
    if min(height, width) <= 0 or max(height, width) / min(height, width) > HIGHEST_ASPECT:
        raise ValueError(f"an image of {width}x{height} px has no aspect ratio of at most {HIGHEST_ASPECT}")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_px:
        scale = math.sqrt(height * width / max_px)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < min_px:
        scale = math.sqrt(min_px / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def pixels_from_pil(image: Image.Image, factor: int, min_px: int, max_px: int) -> np.ndarray:
    """RGB uint8 [H, W, 3] after one bicubic resize. Alpha is dropped and EXIF rotation ignored, as the reward models
    were trained. Raises ValueError or OSError on an image that cannot be read."""
    image = image.convert("RGB")
    height, width = smart_resize(image.height, image.width, factor, min_px, max_px)
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


@contextlib.contextmanager
def opened_image(picture: Image.Image | Path | bytes) -> Iterator[Image.Image]:
    """An image, or that of a file or of a file's bytes, which is closed again: of many files only small arrays stay in memory.
    Formats whose readers are no pure parsers (EPS and the like) are refused. Raises ValueError or OSError."""
    if isinstance(picture, Image.Image):
        yield picture
        return
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # some packages switch this on for the whole process when imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns below the size that it refuses
        try:
            image = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture, formats=FORMATS)
        except UnidentifiedImageError:
            if isinstance(picture, bytes):  # Pillow would name the buffer's address, which is another in every process
                raise UnidentifiedImageError("the bytes are no image of a known format") from None
            raise
        with image:
            yield image


def normalise_pixels(pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [..., H, W, 3] to float32 [..., 3, H, W], rounded where Qwen2-VL's image processor rounds: a level of a channel has
    256 values, so they are computed once and looked up."""
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)[:, None]
    table = (levels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(np.stack([table[:, channel][pixels[..., channel]] for channel in range(3)], axis=-3))


def straight_through_clamp(values: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Clamp in the forward pass, identity in the backward pass: a pixel outside [0, 1] can still be pulled back."""
    return values + (values.clamp(low, high) - values).detach()


def straight_through_round(values: Tensor) -> Tensor:
    """Round [0, 1] to 8-bit levels in the forward pass, identity in the backward pass."""
    return values + ((values * 255).round() / 255 - values).detach()


def check_images01(images: Tensor, what: str = "images01") -> None:
    """Raise TypeError or ValueError where `images` is not a float tensor [B, 3, H, W] in about [0, 1]."""
    if not torch.is_floating_point(images):
        raise TypeError(f"{what} must be float in [0, 1], not {images.dtype}: divide 8-bit pixels by 255")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{what} must be [batch, 3, height, width], not {tuple(images.shape)}")
    with torch.no_grad():
        low, high = float(images.min()), float(images.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{what} holds a value that is not finite")
    if high > HIGHEST_VALUE or low < LOWEST_VALUE:
        raise ValueError(f"{what} runs from {low:.3g} to {high:.3g}; expected about [0, 1] (map [-1, 1] by (x + 1) / 2)")


def normalised_from_tensor(
    images: Tensor, factor: int, min_px: int, max_px: int, mean: tuple[float, ...], std: tuple[float, ...],
    *, round_to_8_bits: bool = False,
) -> Tensor:  # fmt: skip
    """Differentiable counterpart of the PIL path: float [B, 3, H, W] in [0, 1] to normalised float32 [B, 3, H', W'].
    `round_to_8_bits` rounds where a file and PIL's resize would, with the gradient passed straight through."""
    images = straight_through_clamp(images.float())
    images = straight_through_round(images) if round_to_8_bits else images
    height, width = smart_resize(images.shape[-2], images.shape[-1], factor, min_px, max_px)
    if images.shape[-2:] != (height, width):
        # Bicubic overshoots at edges; PIL clips to 8 bits there, so this clamps again.
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)
        images = straight_through_clamp(images)
        images = straight_through_round(images) if round_to_8_bits else images
    shape = (1, 3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def patchify(images: Tensor, patch: int, merge: int, temporal: int) -> Tensor:
    """[B, 3, H, W] to [B, H/patch * W/patch, 3 * temporal * patch * patch], patches of one merge block side by side
    and the still image repeated over `temporal` frames (Qwen2-VL's order)."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch, width // patch
    blocks = images.reshape(batch, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)  # batch, row, column, in-block row, in-block column, C, y, x
    blocks = blocks.unsqueeze(6).expand(*blocks.shape[:6], temporal, patch, patch)
    return blocks.reshape(batch, rows * columns, channels * temporal * patch * patch)
