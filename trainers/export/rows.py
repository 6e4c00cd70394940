"""Calibration rows: what callers hand over, checked and split into rows to calibrate on and rows to measure on.
Both come from curated data and never overlap unless there are too few, which the manifest then says."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TASKS = ("generate", "edit")


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt (task 'generate', image None) or one edit (task 'edit', image = the source, uint8 (H, W, 3)).

    identifier: the row's name where it came from, '' where it has none.
    """

    task: str
    text: str
    image: np.ndarray | None
    seed: int
    identifier: str = ""


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows to calibrate on and rows to measure parity on; `disjoint` is False where a row serves both."""

    calibration: list[Row]
    parity: list[Row]
    disjoint: bool


def read_rows(items: Sequence[dict[str, Any]], seed: int) -> list[Row]:
    """Rows from dicts with `task`, `text`, for edits `image` (PIL, uint8 array or encoded bytes) = the source, and maybe `id`.

    ValueError names the first row that is wrong.
    """
    rows = []
    for index, item in enumerate(items):
        task, text, image = item.get("task"), item.get("text"), item.get("image")
        if task not in TASKS or not isinstance(text, str):
            raise ValueError(f"calibration row {index} needs task 'generate' or 'edit' and a text, got {sorted(item)}.")
        if task == "edit" and image is None:
            raise ValueError(f"calibration row {index} is an edit without its source image; add 'image'.")
        rows.append(Row(task, text, _pixels(image) if task == "edit" else None, seed * 1_000_003 + index, str(item.get("id", ""))))
    return rows


def split_rows(rows: Sequence[Row], calibration_rows: int, parity_rows: int) -> Split:
    """The first rows of each task (half of calibration_rows each) calibrate, the last parity_rows of each measure."""
    calibration, parity, disjoint = [], [], True
    present = [task for task in TASKS if any(row.task == task for row in rows)]
    for task in present:
        mine = [row for row in rows if row.task == task]
        measured = mine[-parity_rows:]
        free = mine[: len(mine) - len(measured)]
        disjoint &= bool(free)
        calibration += (free or mine)[: max(1, calibration_rows // len(present))]
        parity += measured
    return Split(calibration, parity, disjoint)


def write_calibration(folder: Path, rows: Split, sigmas: Sequence[float], used: bool) -> None:
    """folder/calibration.json: which rows set the ranges of activations (none where not `used`), and which measured parity."""

    def names(chosen: Sequence[Row]) -> list[dict[str, Any]]:
        return [{"id": row.identifier, "task": row.task, "seed": row.seed} for row in chosen]

    record = {
        "inputs": "every UNet call of the fp32 student on these rows, each at all its sigmas; generate: zero right half; edit: real latents",
        "sigmas": list(sigmas[:-1]),
        "rows": names(rows.calibration) if used else [],
        "parity_rows": names(rows.parity),
        "disjoint": rows.disjoint,
    }
    (folder / "calibration.json").write_text(json.dumps(record, indent=2) + "\n")


def _pixels(image: Any) -> np.ndarray:
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    return np.asarray(image, np.uint8)
