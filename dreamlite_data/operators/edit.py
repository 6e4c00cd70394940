"""Make edit triplets from photos by exact operators (exposure, blur, ...): instruction, target and their fit are certain.
The instructor chooses what to ask for, the editor does it; both work with no weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from scipy import ndimage

from dreamlite_data import schema
from dreamlite_data.images import decode_stored, encode_png
from dreamlite_data.operators.base import by_row
from dreamlite_data.operators.ingest import edit_id

Pixels = np.ndarray  # uint8 [H, W, 3]


def _float_edit(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Pixels], Pixels]:
    return lambda pixels: np.clip(np.rint(change(pixels.astype(np.float32))), 0, 255).astype(np.uint8)


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat((values @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None], 3, axis=2)


EXACT_EDITS: dict[str, tuple[str, Callable[[Pixels], Pixels]]] = {
    "make the picture brighter": ("exposure", _float_edit(lambda values: values * 1.4)),
    "make the picture darker": ("exposure", _float_edit(lambda values: values * 0.6)),
    "blur the picture": ("blur", _float_edit(lambda values: ndimage.gaussian_filter(values, (2.0, 2.0, 0)))),
    "turn the picture black and white": ("greyscale", _float_edit(_grey)),
    "mirror the picture from left to right": ("mirror", lambda pixels: np.ascontiguousarray(pixels[:, ::-1])),
    "raise the contrast of the picture": ("contrast", _float_edit(lambda values: (values - 128) * 1.5 + 128)),
    "give the picture warmer colours": ("warmth", _float_edit(lambda values: values * np.array([1.15, 1.0, 0.8], np.float32))),
}
"""Instruction -> (edit type, the operation)."""


class Instructor(Protocol):
    """Writes edit instructions for an image."""

    name: str

    def instructions(self, pixels: Pixels, image_id: str, count: int) -> list[str]: ...


class Editor(Protocol):
    """Makes the target of an instruction; None where it cannot follow it."""

    name: str

    def edit(self, pixels: Pixels, instruction: str) -> Pixels | None: ...


class ExactInstructor:
    """Draws from the exact edits, by the image's own id."""

    name = "exact"

    def instructions(self, pixels: Pixels, image_id: str, count: int) -> list[str]:
        order = sorted(EXACT_EDITS, key=lambda words: hashlib.sha256(f"{image_id}{words}".encode()).digest())
        return order[:count]


class ExactEditor:
    """Applies an exact edit, pixel by pixel."""

    name = "exact"

    def edit(self, pixels: Pixels, instruction: str) -> Pixels | None:
        found = EXACT_EDITS.get(instruction)
        return found[1](pixels) if found else None


class Edit:
    """Operator over photos: makes `count` triplets of each. Targets become images, triplets rows of `edits`."""

    name = "edit"
    version = 1
    reads = ("image_id", "bytes")
    table = "op_edit"
    resources = {"num_cpus": 1.0}
    schema = schema.OPERATORS["op_edit"]

    def __init__(self, count: int, instructor: Instructor | None = None, editor: Editor | None = None) -> None:
        self.count, self.instructor, self.editor = count, instructor or ExactInstructor(), editor or ExactEditor()
        self._made: dict[str, list[tuple[str, Pixels]]] = {}

    def config(self) -> dict[str, Any]:
        return {"count": self.count, "instructor": self.instructor.name, "editor": self.editor.name}

    def __call__(self, rows: pa.Table) -> pa.Table:
        self._made = {}
        return by_row(self._one, rows, "image_id", self.schema)

    def _one(self, row: dict[str, Any]) -> dict[str, Any]:
        pixels = decode_stored(row["bytes"])
        tries = [
            (words, self.editor.edit(pixels, words))
            for words in self.instructor.instructions(pixels, row["image_id"], self.count)
        ]
        made = [(words, target) for words, target in tries if target is not None]
        self._made[row["image_id"]] = made
        return {"edits": len(made)}

    def side_tables(self, rows: pa.Table, answer: pa.Table) -> dict[str, pa.Table]:
        """The targets and the triplets of the call just made."""
        images, edits = {}, {}
        for source_id, made in self._made.items():
            for words, pixels in made:
                payload = encode_png(pixels)
                target_id = hashlib.sha256(payload).hexdigest()
                images[target_id] = {
                    "image_id": target_id, "bytes": payload, "mime": "image/png", "width": pixels.shape[1],
                    "height": pixels.shape[0], "size_bytes": len(payload),
                }  # fmt: skip
                identity = edit_id(source_id, target_id, words)
                edits[identity] = {
                    "edit_id": identity, "source_image_id": source_id, "target_image_id": target_id, "instruction": words,
                    "edit_type": EXACT_EDITS[words][0] if words in EXACT_EDITS else None, "route": self.editor.name,
                }  # fmt: skip
        return {
            "images": schema.rows_table("images", [images[key] for key in sorted(images)]),
            "edits": schema.rows_table("edits", [edits[key] for key in sorted(edits)]),
        }
