"""The scene graph: one to three coloured shapes on a background, and how to draw one at random.
Two scenes are the same when their keys are equal; jitter and brightness are free variation."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (40, 165, 60),
    "blue": (45, 85, 225),
    "yellow": (245, 220, 45),
    "purple": (145, 45, 190),
    "orange": (245, 135, 25),
    "cyan": (60, 210, 225),
    "pink": (250, 140, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (238, 238, 238),
    "grey": (128, 128, 128),
    "navy": (22, 30, 72),
    "brown": (104, 72, 44),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES: dict[str, float] = {"small": 6.0, "large": 9.0}  # half extent in px on a 64 px canvas
STYLES = ("plain", "shaded")
POSITIONS = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
CANVAS_PX = 64
CELL_PX = CANVAS_PX / 3
JITTER_PX = 1.2
BRIGHTNESS = 0.06


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One shape. `offset` is the jitter in px from the cell's centre, `brightness` scales the colour."""

    colour: str
    shape: str
    size: str
    position: str
    offset: tuple[float, float] = (0.0, 0.0)
    brightness: float = 1.0

    def key(self) -> tuple[str, str, str, str]:
        """What a caption can say of the object: (colour, shape, size, position)."""
        return (self.colour, self.shape, self.size, self.position)

    def centre_px(self) -> tuple[float, float]:
        """Centre (x, y) in px on the 64 px canvas."""
        row, column = divmod(POSITIONS.index(self.position), 3)
        return ((column + 0.5) * CELL_PX + self.offset[0], (row + 0.5) * CELL_PX + self.offset[1])


@dataclasses.dataclass(frozen=True)
class Scene:
    """One to three objects in different cells, a background colour and a background style."""

    objects: tuple[SceneObject, ...]
    background: str
    style: str

    def key(self) -> tuple[Any, ...]:
        """Canonical description without jitter: equal keys mean that one caption fits both scenes."""
        return (self.background, self.style, tuple(sorted(item.key() for item in self.objects)))

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal scene."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Scene:
        """Read `to_json`'s text; raises KeyError or ValueError where a field is missing or malformed."""
        fields = json.loads(text)
        objects = tuple(
            SceneObject(**{**item, "offset": tuple(item["offset"])}) for item in fields["objects"]
        )
        return cls(objects=objects, background=fields["background"], style=fields["style"])


def sample_object(rng: np.random.Generator, position: str) -> SceneObject:
    """Draw one object for a cell, uniform over colour, shape and size."""
    return SceneObject(
        colour=str(rng.choice(list(COLOURS))),
        shape=str(rng.choice(SHAPES)),
        size=str(rng.choice(list(SIZES))),
        position=position,
        offset=(float(rng.uniform(-JITTER_PX, JITTER_PX)), float(rng.uniform(-JITTER_PX, JITTER_PX))),
        brightness=float(rng.uniform(1 - BRIGHTNESS, 1)),
    )


def sample_scene(rng: np.random.Generator, object_count: int | None = None) -> Scene:
    """Draw a scene. No two objects share both colour and shape, so "the red circle" names one thing."""
    count = int(rng.integers(1, 4)) if object_count is None else object_count
    cells = rng.permutation(len(POSITIONS))[:count]
    objects: list[SceneObject] = []
    for cell in cells:
        while True:
            item = sample_object(rng, POSITIONS[cell])
            if all((item.colour, item.shape) != (other.colour, other.shape) for other in objects):
                break
        objects.append(item)
    return Scene(
        objects=tuple(objects),
        background=str(rng.choice(list(BACKGROUNDS))),
        style=str(rng.choice(STYLES)),
    )
