"""Draw a scene as an anti-aliased RGB image.
Shapes are signed distance functions, so sub-pixel jitter shows and every size renders cleanly."""

from __future__ import annotations

import numpy as np

from dreamlite_data.scenes.scene import BACKGROUNDS, CANVAS_PX, COLOURS, SIZES, Scene

SHADE = 56.0  # how far the far end of a shaded background moves in value


def render(scene: Scene, size_px: int = CANVAS_PX) -> np.ndarray:
    """Draw `scene` as uint8 [size_px, size_px, 3]."""
    image = background(scene.background, scene.style, size_px).copy()
    scale = size_px / CANVAS_PX
    for item in scene.objects:
        centre_x, centre_y = item.centre_px()
        alpha = coverage(item.shape, SIZES[item.size] * scale, centre_x * scale, centre_y * scale, size_px)
        colour = np.asarray(COLOURS[item.colour], dtype=np.float32) * item.brightness
        image += alpha[..., None] * (colour - image)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def background(name: str, style: str, size_px: int = CANVAS_PX) -> np.ndarray:
    """Background as float32 [size_px, size_px, 3]; `shaded` runs from the colour at the top to a second tone."""
    base = np.asarray(BACKGROUNDS[name], dtype=np.float32)
    rows = np.zeros(size_px, dtype=np.float32)
    if style == "shaded":
        # Dark colours grow lighter and light ones darker, so the second tone never clips.
        rows = np.linspace(0, SHADE, size_px, dtype=np.float32) * (-1 if base.mean() > 140 else 1)
    return np.broadcast_to(base + rows[:, None, None], (size_px, size_px, 3)).astype(np.float32)


def coverage(shape: str, radius: float, centre_x: float, centre_y: float, size_px: int) -> np.ndarray:
    """Share of each pixel inside the shape, float32 [size_px, size_px]; `radius` is the half extent in px."""
    x = np.arange(size_px, dtype=np.float32)[None, :] + 0.5 - centre_x
    y = np.arange(size_px, dtype=np.float32)[:, None] + 0.5 - centre_y
    if shape == "circle":
        distance = np.sqrt(x * x + y * y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.88 * radius
    elif shape == "triangle":  # apex up, bounding box 2 radius on each side
        slant = (2 * np.abs(x) - y - radius) / np.float32(np.sqrt(5.0))
        distance = np.maximum(slant, y - radius)
    elif shape == "cross":
        arm = 0.36 * radius
        upright = np.maximum(np.abs(x) - arm, np.abs(y) - radius)
        level = np.maximum(np.abs(y) - arm, np.abs(x) - radius)
        distance = np.minimum(upright, level)
    else:
        raise ValueError(f"no shape is called {shape!r}: the small world knows circle, square, triangle, cross")
    return np.clip(0.5 - distance, 0.0, 1.0)
