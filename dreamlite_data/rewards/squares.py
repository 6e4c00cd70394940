"""Images to the fixed square that CLIP-, SigLIP- and BLIP-class scorers see: by Pillow for datasets, by tensors for gradients.
How a square is cut differs between them by a pixel or a border, and each scorer was trained with its own way."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dreamlite_data.rewards.preprocess import straight_through_clamp
from dreamlite_data.rewards.stored import RewardCheckpointError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3  # Pillow's number, as image processors store it
PREPROCESSOR_FILE = "preprocessor_config.json"


@dataclasses.dataclass(frozen=True)
class Square:
    """How an image becomes `side_px` x `side_px`.

    `fit`: 'crop' scales the shorter side and cuts the middle; 'squash' scales both sides; 'pad' scales the longer side and
    fills up with black. `centre` says where the middle of an odd difference is: transformers rounds down, torchvision rounds
    half to even. 'pad' resizes floats, as HPSv2's own code does, so its datasets and gradients see the same pixels.
    """

    side_px: int
    fit: Literal["crop", "squash", "pad"] = "crop"
    centre: Literal["floor", "round"] = "floor"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing, before cutting or padding. Raises ValueError where a side would vanish."""
        if self.fit == "squash":
            return self.side_px, self.side_px
        short, long = min(height, width), max(height, width)
        if self.fit == "crop":
            other = int(self.side_px * long / short)  # cut off, as torchvision and transformers do
            return (self.side_px, other) if height <= width else (other, self.side_px)
        scale = self.side_px / float(long)
        size = round(height * scale), round(width * scale)
        if min(size) == 0:
            raise ValueError(f"an image of {width}x{height} px has no pixel left on one side at {self.side_px} px")
        return size

    def offset(self, length: int) -> int:
        """Where the square begins on a side of `length` pixels."""
        spare = length - self.side_px
        return spare // 2 if self.centre == "floor" else int(round(spare / 2.0))

    def pixels(self, image: Image.Image) -> np.ndarray:
        """[side, side, 3] of an RGB, RGBA or other image: uint8, or float32 in [0, 1] (and a little beyond) for 'pad'."""
        image = image.convert("RGB")
        if self.fit == "pad":
            values = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
            return self.cut(self.resized(values))[0].permute(1, 2, 0).numpy()
        height, width = self.size(image.height, image.width)
        if (image.height, image.width) != (height, width):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        top, left = self.offset(height), self.offset(width)
        return np.asarray(image)[top : top + self.side_px, left : left + self.side_px]

    def resized(self, images01: Tensor) -> Tensor:
        """Bicubic with antialiasing, [B, 3, H, W] float; without clamp, for bicubic overshoots where Pillow clips."""
        size = self.size(images01.shape[-2], images01.shape[-1])
        if tuple(images01.shape[-2:]) == size:
            return images01
        return F.interpolate(images01, size, mode="bicubic", antialias=True, align_corners=False)

    def cut(self, images01: Tensor) -> Tensor:
        """The square out of [B, 3, H, W], or around it."""
        height, width = images01.shape[-2:]
        if self.fit == "pad":
            down, right = self.side_px - height, self.side_px - width
            return F.pad(images01, (right // 2, right - right // 2, down // 2, down - down // 2))
        top, left = self.offset(height), self.offset(width)
        return images01[..., top : top + self.side_px, left : left + self.side_px]

    def normalised(self, values: Tensor) -> Tensor:
        """(x - mean) / std of [B, 3, side, side] in [0, 1]."""
        shape = (1, 3, 1, 1)
        return (values - values.new_tensor(self.mean).view(shape)) / values.new_tensor(self.std).view(shape)

    def of_pixels(self, pixels: np.ndarray) -> Tensor:
        """Normalised float32 [B, 3, side, side] of packed pixels [B, side, side, 3]."""
        values = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 1))).float()
        return self.normalised(values / 255 if pixels.dtype == np.uint8 else values)

    def of_tensor(self, images01: Tensor) -> Tensor:
        """Normalised float32 [B, 3, side, side] of images [B, 3, H, W] in [0, 1], with gradient to them."""
        values = self.resized(straight_through_clamp(images01.float()))
        if self.fit != "pad":
            values = straight_through_clamp(values)
        return self.normalised(self.cut(values))


def read_square(folder: Path, centre: Literal["floor", "round"] = "floor") -> Square:
    """The square that a model folder's image processor makes. Raises RewardCheckpointError where it does something else."""
    path = Path(folder) / PREPROCESSOR_FILE
    if not path.exists():
        raise RewardCheckpointError(f"{folder} has no {PREPROCESSOR_FILE}: copy it from the model that this scorer was trained from")
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    size, crop = _sides(config.get("size")), _sides(config.get("crop_size"))
    mean, std = tuple(config.get("image_mean", CLIP_MEAN)), tuple(config.get("image_std", CLIP_STD))
    if config.get("resample", BICUBIC) != BICUBIC:
        raise RewardCheckpointError(f"{path}: resample is {config['resample']}; only bicubic ({BICUBIC}) is known here")
    # A bare number means the shorter side for CLIP (which crops) and both sides for SigLIP (which does not).
    crops = config.get("do_center_crop", "crop_size" in config or "shortest_edge" in (config.get("size") or {}))
    if crops and len(size) == 1 and set(crop or size) == set(size):
        return Square(size[0], "crop", centre, mean, std)
    if not crops and (len(size) == 1 or size[0] == size[1]) and "shortest_edge" not in config["size"]:
        return Square(size[0], "squash", centre, mean, std)
    raise RewardCheckpointError(
        f"{path}: size {config.get('size')} with crop_size {config.get('crop_size')} makes no square that is known here: "
        "either the shorter side and an equal crop, or one height and width"
    )


def _sides(size: Any) -> tuple[int, ...]:
    if size is None:
        return ()
    if isinstance(size, dict):
        return tuple(int(size[name]) for name in ("shortest_edge", "height", "width") if name in size)
    return (int(size),)
