"""Measure how an image looks, with no model: sharpness, exposure, contrast, entropy, colour, and two hashes for duplicates.
One decode gives everything; images of one size are measured together."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from scipy import fft, ndimage

from dreamlite_data import schema
from dreamlite_data.images import decode_stored

HASH_INPUT_PX = 32
HASH_SIDE = 8
EDGE_WINDOW_PX = 9
BATCH_PX = 4_000_000
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


class Quality:
    """Operator over stored images."""

    name = "quality"
    version = 1
    reads = ("image_id", "bytes")
    table = "op_quality"
    resources = {"num_cpus": 1.0}
    schema = schema.OPERATORS["op_quality"]

    def config(self) -> dict[str, Any]:
        return {"hash_input_px": HASH_INPUT_PX, "edge_window_px": EDGE_WINDOW_PX}

    def __call__(self, rows: pa.Table) -> pa.Table:
        ids = rows["image_id"].to_pylist()
        answers: list[dict[str, Any]] = [{} for _ in ids]
        decoded: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}
        for index, payload in enumerate(rows["bytes"].to_pylist()):
            try:
                pixels = decode_stored(payload)
                if min(pixels.shape[:2]) < 2:
                    raise ValueError(f"{pixels.shape[1]} x {pixels.shape[0]} px is too small to measure")
            except Exception as error:
                answers[index] = {"error": f"{type(error).__name__}: {error}"[:500]}
                continue
            decoded.setdefault(pixels.shape[:2], []).append((index, pixels))
        for (height, width), group in sorted(decoded.items()):
            step = max(1, BATCH_PX // (height * width))
            for start in range(0, len(group), step):
                part = group[start : start + step]
                measured = measure(np.stack([pixels for _, pixels in part]))
                for position, (index, pixels) in enumerate(part):
                    answers[index] = {name: values[position].item() for name, values in measured.items()}
                    shape = f"{width}x{height}:".encode()
                    answers[index]["pixel_sha256"] = hashlib.sha256(shape + pixels.tobytes()).hexdigest()
        return pa.Table.from_pylist(
            [{"subject_id": image_id, **answer} for image_id, answer in zip(ids, answers, strict=True)], schema=self.schema
        )


def measure(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Measures of uint8 [N, H, W, 3], each as an array [N]."""
    luma = pixels.astype(np.float32) @ LUMA
    return {
        "phash": phash(luma),
        "sharpness": sharpness(steepest_channel(pixels)),
        "laplacian_variance": np.stack([ndimage.laplace(one, mode="nearest").var() for one in luma]),
        "brightness": luma.mean((1, 2)) / 255,
        "contrast": luma.std((1, 2)) / 255,
        "entropy_bits": _entropy(luma),
        "colourfulness": _colourfulness(pixels),
        "clipped_fraction": ((luma < 2) | (luma > 253)).mean((1, 2)),
    }


def phash(luma: np.ndarray) -> np.ndarray:
    """64-bit perceptual hash of float32 [N, H, W], as uint64 [N]: sign of the 8 x 8 lowest frequencies against their
    median, after shrinking to 32 x 32 (the DCT hash of Zauner, 2010)."""
    small = np.stack([
        np.asarray(Image.fromarray(one).resize((HASH_INPUT_PX, HASH_INPUT_PX), Image.Resampling.BOX)) for one in luma
    ])  # fmt: skip
    low = fft.dctn(small, axes=(1, 2), norm="ortho")[:, :HASH_SIDE, :HASH_SIDE].reshape(len(luma), -1)
    # Rounding keeps a flat image, whose coefficients are all noise, at one hash on every machine.
    low = np.round(low, 3)
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8").reshape(-1).astype(np.uint64)


def steepest_channel(pixels: np.ndarray) -> np.ndarray:
    """Of each image in uint8 [N, H, W, 3] the channel with the largest step, float32 [N, H, W]: two colours of one
    brightness have an edge too, which luma does not show."""
    channels = pixels.astype(np.float32)
    steps = np.maximum(np.abs(np.diff(channels, axis=2)).max((1, 2)), np.abs(np.diff(channels, axis=1)).max((1, 2)))
    return channels[np.arange(len(pixels)), :, :, steps.argmax(1)]


def sharpness(values: np.ndarray) -> np.ndarray:
    """How steep the steepest edges are, in [0, 1] for float32 [N, H, W]: the largest step between neighbouring pixels as a
    share of the contrast around it. A clean edge crosses its contrast in one or two pixels (0.5 to 1); after a Gaussian
    blur of sigma s the steepest step is 1 / (s sqrt(2 pi)) of it. Contrast cancels, so dim pictures are not called blurred."""
    answers = np.zeros(len(values), dtype=np.float32)
    for index, one in enumerate(values):
        step = np.zeros_like(one)
        across, down = np.abs(np.diff(one, axis=1)), np.abs(np.diff(one, axis=0))
        step[:, :-1] = across
        step[:-1] = np.maximum(step[:-1], down)
        spread = ndimage.maximum_filter(one, EDGE_WINDOW_PX) - ndimage.minimum_filter(one, EDGE_WINDOW_PX)
        strong = spread > 0.4 * spread.max()
        if spread.max() < 4:  # nothing but noise: no edge to judge
            continue
        ratios = step[strong] / spread[strong]
        keep = max(4, int(0.01 * ratios.size))
        answers[index] = np.median(np.partition(ratios, -min(keep, ratios.size))[-keep:])
    return answers


def _entropy(luma: np.ndarray) -> np.ndarray:
    """Shannon entropy in bits of the 256-bin grey histogram of each image."""
    count, size = len(luma), luma[0].size
    levels = np.clip(luma, 0, 255).astype(np.int64).reshape(count, -1) + 256 * np.arange(count)[:, None]
    share = np.bincount(levels.ravel(), minlength=256 * count).reshape(count, 256) / size
    return -(share * np.log2(np.where(share > 0, share, 1))).sum(1)


def _colourfulness(pixels: np.ndarray) -> np.ndarray:
    """The metric of Hasler and Suesstrunk (2003), eq. M3, on uint8 [N, H, W, 3]."""
    red, green, blue = (pixels[..., channel].astype(np.float32) for channel in range(3))
    red_green, yellow_blue = red - green, 0.5 * (red + green) - blue
    spread = np.hypot(red_green.std((1, 2)), yellow_blue.std((1, 2)))
    return spread + 0.3 * np.hypot(red_green.mean((1, 2)), yellow_blue.mean((1, 2)))
