"""What the throw-away heads of the frozen parts must name: the classes of objects and backgrounds, per cell.
A part that can say them in one layer has them in its states, where the diffusion model finds them too."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from dreamlite_data import scenes

FIELDS = {
    "colour": ["none", *scenes.COLOURS],
    "shape": ["none", *scenes.SHAPES],
    "size": ["none", *scenes.SIZES],
}
GLOBALS = {"background": list(scenes.BACKGROUNDS), "style": list(scenes.STYLES)}
CELLS = len(scenes.POSITIONS)
IGNORE = -100
"""The label that cross_entropy skips."""


def label_columns(labels: list[dict[str, int]], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """One column, [rows], for each name; what a row does not say is ignored."""
    return {name: torch.tensor([each.get(name, IGNORE) for each in labels]) for name in names}


def scene_labels(batch: list[scenes.Scene]) -> dict[str, torch.Tensor]:
    """Class indices by position of the 3 x 3 grid, [B, 9] per field, and of the background, [B] per global."""
    labels = {name: torch.zeros(len(batch), CELLS, dtype=torch.long) for name in FIELDS}
    labels |= {name: torch.zeros(len(batch), dtype=torch.long) for name in GLOBALS}
    for row, scene in enumerate(batch):
        for item in scene.objects:
            for name, values in FIELDS.items():
                labels[name][row, scenes.POSITIONS.index(item.position)] = values.index(getattr(item, name))
        for name, values in GLOBALS.items():
            labels[name][row] = values.index(getattr(scene, name))
    return labels


def cell_classes(scene: scenes.Scene, cell_px: int) -> np.ndarray:
    """Class indices by latent cell, int64 [fields, side, side]: an object fills the cells that it covers by more than 1 px."""
    side = scenes.CANVAS_PX // cell_px
    classes = np.zeros((len(FIELDS), side, side), dtype=np.int64)
    for item in scene.objects:
        reach = scenes.SIZES[item.size] - 1
        columns, rows = (
            slice(max(int((centre - reach) // cell_px), 0), int((centre + reach) // cell_px) + 1) for centre in item.centre_px()
        )
        values = [names.index(getattr(item, name)) for name, names in FIELDS.items()]
        classes[:, rows, columns] = np.asarray(values)[:, None, None]
    return classes
