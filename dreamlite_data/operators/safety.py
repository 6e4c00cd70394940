"""Look for what must not be in a public dataset: exposed nudity, faces, watermarks. Scores only; a policy decides.
Each part runs only where it is asked for, and what was not asked for is null."""

from __future__ import annotations

import functools
import hashlib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from dreamlite_data import schema
from dreamlite_data.images import decode_stored
from dreamlite_data.inference import worker_threads
from dreamlite_data.model_settings import SafetySettings
from dreamlite_data.operators.base import by_row

NSFW_LABELS = frozenset({
    "FEMALE_GENITALIA_EXPOSED", "MALE_GENITALIA_EXPOSED", "FEMALE_BREAST_EXPOSED", "BUTTOCKS_EXPOSED", "ANUS_EXPOSED",
})  # fmt: skip
"""Of nudenet's 18 labels those that show nudity; the others name covered parts, faces, feet and the like."""
FACE_SEARCH_PX = 512
"""Longer side at which faces are looked for: the cascade's cost grows with the area, and smaller faces identify nobody."""
SMALLEST_FACE_PX = 32
"""In the search image; the cascade itself was trained on windows of 24 px, where it sees faces in any texture."""
WINDOW_GROWTH = 1.2


class MissingExtra(RuntimeError):
    """A measurement was asked for whose package is not installed; the message names the extra to install."""


def require_extra(package: str, extra: str, setting: str) -> None:
    """Raise MissingExtra unless `package` can be imported. Imports nothing."""
    if find_spec(package) is None:
        raise MissingExtra(
            f"refresh.{setting} needs the package {package}, which is not installed: pip install 'dreamlite-pipeline[{extra}]', or set "
            f"refresh.{setting} to false"
        )


class Safety:
    """Operator over stored images."""

    name = "safety"
    version = 1
    reads = ("image_id", "bytes")
    table = "op_safety"
    resources = {"num_cpus": 1.0}
    schema = schema.OPERATORS["op_safety"]

    def __init__(self, settings: SafetySettings, watermark_weights: str = "") -> None:
        """`watermark_weights` is the digest of the watermark classifier."""
        self.settings, self.watermark_weights = settings, watermark_weights

    def config(self) -> dict[str, Any]:
        return {
            "nsfw": f"nudenet {metadata.version('nudenet')}" if self.settings.nsfw else None,
            "faces": [_cascade_digest(), FACE_SEARCH_PX, SMALLEST_FACE_PX, WINDOW_GROWTH] if self.settings.faces else None,
            "watermark": self.watermark_weights or None,
        }

    def __call__(self, rows: pa.Table) -> pa.Table:
        return by_row(self._one, rows, "image_id", self.schema)

    def _one(self, row: dict[str, Any]) -> dict[str, Any]:
        pixels, answer = decode_stored(row["bytes"]), {}
        if self.settings.nsfw:
            answer |= _nsfw(pixels)
        if self.settings.faces:
            boxes = find_faces(pixels)
            answer |= {"faces": len(boxes), "face_fraction": covered_fraction(boxes, *pixels.shape[:2])}
        if self.settings.watermark:
            with worker_threads():
                answer["watermark"] = _watermark_classifier(self.settings.watermark).score(pixels)
        return answer


def _nsfw(pixels: np.ndarray) -> dict[str, Any]:
    """The highest confidence of an exposed part (0 where nudenet sees none) and its label."""
    exposed = [(float(one["score"]), one["class"]) for one in _seen(pixels) if one["class"] in NSFW_LABELS]
    score, label = max(exposed, default=(0.0, None))
    return {"nsfw": score, "nsfw_label": label}


def _seen(pixels: np.ndarray) -> list[dict[str, Any]]:
    """What nudenet detects in uint8 [H, W, 3], as if it had read the file itself (so in OpenCV's order of channels)."""
    return _nude_detector().detect(np.ascontiguousarray(pixels[..., ::-1]))


@functools.cache
def _nude_detector() -> Any:
    from nudenet import NudeDetector

    return NudeDetector()  # its wheel carries the weights


@functools.cache
def _cascade_digest() -> str:
    from skimage.data import lbp_frontal_face_cascade_filename

    return hashlib.sha256(Path(lbp_frontal_face_cascade_filename()).read_bytes()).hexdigest()[:16]


@functools.cache
def _cascade() -> Any:
    from skimage.data import lbp_frontal_face_cascade_filename
    from skimage.feature import Cascade

    return Cascade(lbp_frontal_face_cascade_filename())


def find_faces(pixels: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Frontal faces in uint8 [H, W, 3] as (top, left, height, width) in its pixels, by scikit-image's LBP cascade."""
    height, width = pixels.shape[:2]
    scale = min(1.0, FACE_SEARCH_PX / max(height, width))
    small = np.asarray(Image.fromarray(pixels).resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX))
    side = min(small.shape[:2])
    if side < SMALLEST_FACE_PX:
        return []
    found = _cascade().detect_multi_scale(
        img=small, scale_factor=WINDOW_GROWTH, step_ratio=1, min_size=(SMALLEST_FACE_PX,) * 2, max_size=(side, side)
    )
    boxes = [tuple(round(one[name] / scale) for name in ("r", "c", "height", "width")) for one in found]
    return sorted(boxes)


def covered_fraction(boxes: list[tuple[int, int, int, int]], height: int, width: int) -> float:
    """Share of an image that lies in any of the boxes (top, left, height, width)."""
    inside = np.zeros((height, width), dtype=bool)
    for top, left, tall, wide in boxes:
        inside[max(0, top) : top + tall, max(0, left) : left + wide] = True
    return float(inside.mean()) if inside.size else 0.0


class _WatermarkClassifier:
    """An image classifier of transformers with a label that has 'watermark' in it and does not begin with 'no'."""

    def __init__(self, model: str) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.network = AutoModelForImageClassification.from_pretrained(model, dtype=torch.float32, use_safetensors=True).eval()
        self.processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        labels = {index: label.lower() for index, label in self.network.config.id2label.items()}
        self.marked = [index for index, label in labels.items() if "watermark" in label and not label.startswith(("no", "without", "clean"))]
        if len(self.marked) != 1:
            raise ValueError(
                f"refresh.safety.watermark: the classifier {model} has the labels {', '.join(sorted(labels.values()))}; exactly one must say "
                "'watermark'"
            )

    def score(self, pixels: np.ndarray) -> float:
        """Probability in [0, 1] that uint8 [H, W, 3] carries a watermark."""
        import torch

        with torch.inference_mode():
            logits = self.network(**self.processor(images=Image.fromarray(pixels), return_tensors="pt")).logits[0]
        return float(logits.softmax(-1)[self.marked[0]])


@functools.cache
def _watermark_classifier(model: str) -> _WatermarkClassifier:
    return _WatermarkClassifier(model)
