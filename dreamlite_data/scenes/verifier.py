"""Read a scene back out of any image: what a human grader would say, as a function.
Exact on rendered scenes; on a model's images it answers None where no scene can be read."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from scipy import ndimage

from dreamlite_data.scenes.render import background, coverage, render
from dreamlite_data.scenes.scene import BACKGROUNDS, CANVAS_PX, CELL_PX, COLOURS, POSITIONS, SHAPES, SIZES, STYLES, Scene, SceneObject

FOREGROUND_DISTANCE = 48.0  # RGB distance from the background that counts as an object
SMALLEST_AREA_PX = 24
WINDOW_PX = 32  # an object is read in a window of this size: the largest is 18 px wide
LARGEST_COLOUR_DISTANCE = 75.0
LOWEST_OVERLAP = 0.62
LARGEST_OFFSET_PX = 5.5  # further from the cell's centre the position is no longer a clear word
LARGEST_RESIDUAL = 20.0  # mean absolute difference to the scene as read, above which the image shows something else


@dataclasses.dataclass(frozen=True)
class Reading:
    """What was read: `scene` (None where nothing clear), `residual` (mean absolute RGB difference between the image
    and the scene drawn as read; infinite where nothing was read), `reason` (why nothing was read)."""

    scene: Scene | None
    residual: float = float("inf")
    reason: str | None = None


def read_scene(image: np.ndarray) -> Reading:
    """Read `image`, uint8 [64, 64, 3]; raises ValueError on another shape or type."""
    if image.shape != (CANVAS_PX, CANVAS_PX, 3) or image.dtype != np.uint8:
        raise ValueError(f"a scene is read from uint8 [{CANVAS_PX}, {CANVAS_PX}, 3], not {image.dtype} {image.shape}")
    pixels = image.astype(np.float32)
    name, style, distance = _nearest_background(pixels)
    labels, count = ndimage.label(distance > FOREGROUND_DISTANCE)
    objects = []
    behind = background(name, style)
    for label, window in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[window] == label
        if mask.sum() < SMALLEST_AREA_PX:
            continue
        if max(mask.shape) > 2 * CELL_PX:
            return Reading(None, reason="an object larger than any shape")
        item, reason = _read_object(pixels, labels == label, behind, window)
        if item is None:
            return Reading(None, reason=reason)
        objects.append(item)
    if not 1 <= len(objects) <= 3:
        return Reading(None, reason=f"{len(objects)} objects")
    if len({item.position for item in objects}) < len(objects):
        return Reading(None, reason="two objects in one cell")
    scene = Scene(tuple(objects), name, style)
    residual = float(np.abs(render(scene).astype(np.float32) - pixels).mean())
    if residual > LARGEST_RESIDUAL:
        return Reading(None, residual, "the image shows more than the scene read")
    return Reading(scene, residual)


def matches(image: np.ndarray, expected: Scene) -> bool:
    """True where the scene read from `image` has exactly the expected objects, background and style."""
    found = read_scene(image).scene
    return found is not None and found.key() == expected.key()


def edit_matches(source: Scene, image: np.ndarray, target: Scene, drift_px: float = 3.0) -> bool:
    """True where `image` shows exactly `target` and every object that the edit left alone stands where it stood in
    `source`, to `drift_px` px."""
    found = read_scene(image).scene
    return found is not None and found.key() == target.key() and not misplaced(source, found, target, drift_px)


def misplaced(source: Scene, found: Scene, target: Scene, drift_px: float = 3.0) -> bool:
    """True where an object that the edit leaves alone and that was `found` stands elsewhere than in `source`, by over `drift_px` px."""
    places = {item.key(): item.centre_px() for item in found.objects}
    kept = [item for item in source.objects if item in target.objects and item.key() in places]
    return any(np.hypot(*np.subtract(places[item.key()], item.centre_px())) > drift_px for item in kept)


@functools.cache
def _backgrounds() -> tuple[list[tuple[str, str]], np.ndarray]:
    names = [(name, style) for name in BACKGROUNDS for style in STYLES]
    return names, np.stack([background(name, style) for name, style in names])


def _nearest_background(pixels: np.ndarray) -> tuple[str, str, np.ndarray]:
    names, candidates = _backgrounds()
    # Every third pixel is enough to choose, and a clipped distance keeps objects (far from all) from deciding.
    coarse = np.sqrt(((pixels[None, ::3, ::3] - candidates[:, ::3, ::3]) ** 2).sum(-1))
    best = int(np.minimum(coarse, FOREGROUND_DISTANCE).mean((1, 2)).argmin())
    return *names[best], np.sqrt(((pixels - candidates[best]) ** 2).sum(-1))


def _read_object(
    pixels: np.ndarray, mask: np.ndarray, behind: np.ndarray, window: tuple[slice, slice]
) -> tuple[SceneObject, None] | tuple[None, str]:
    top, left = (int(np.clip((part.start + part.stop) // 2 - WINDOW_PX // 2, 0, CANVAS_PX - WINDOW_PX)) for part in window)
    crop = (slice(top, top + WINDOW_PX), slice(left, left + WINDOW_PX))
    pixels, mask, behind = pixels[crop], mask[crop], behind[crop]
    core = ndimage.binary_erosion(mask)
    colour = np.median(pixels[core if core.sum() >= 6 else mask], axis=0)
    names = list(COLOURS)
    palette = np.asarray([COLOURS[name] for name in names], dtype=np.float32)
    distances = np.sqrt(((palette * (1 - 0.03) - colour) ** 2).sum(-1))
    if distances.min() > LARGEST_COLOUR_DISTANCE:
        return None, "a colour outside the palette"
    # How much of each pixel is object: its place on the line from the background to the object's colour.
    line = colour - behind
    alpha = ((pixels - behind) * line).sum(-1) / np.maximum((line * line).sum(-1), 1.0)
    alpha = np.clip(alpha, 0, 1) * ndimage.binary_dilation(mask, iterations=2)
    grid = np.arange(WINDOW_PX, dtype=np.float32) + 0.5
    total = float(alpha.sum())
    centroid_x = float((alpha.sum(0) * grid).sum() / total)
    centroid_y = float((alpha.sum(1) * grid).sum() / total)
    best = (0.0, "", "", 0.0)
    for shape in SHAPES:
        for size, radius in SIZES.items():
            # A triangle's centre of mass lies a third of its radius below the middle of its box.
            centre_y = centroid_y - (radius / 3 if shape == "triangle" else 0.0)
            common = np.minimum(alpha, template := coverage(shape, radius, centroid_x, centre_y, WINDOW_PX)).sum()
            overlap = float(common / (total + template.sum() - common))
            best = max(best, (overlap, shape, size, centre_y))
    overlap, shape, size, centre_y = best
    if overlap < LOWEST_OVERLAP:
        return None, "a shape that is none of the four"
    centre_x, centre_y = centroid_x + left, centre_y + top
    column = int(np.clip(centre_x // CELL_PX, 0, 2))
    row = int(np.clip(centre_y // CELL_PX, 0, 2))
    offset = (centre_x - (column + 0.5) * CELL_PX, centre_y - (row + 0.5) * CELL_PX)
    if max(abs(offset[0]), abs(offset[1])) > LARGEST_OFFSET_PX:
        return None, "an object between two cells"
    found = names[int(distances.argmin())]
    brightness = float(np.clip(colour.mean() / np.mean(COLOURS[found]), 0.8, 1.1))
    return SceneObject(found, shape, size, POSITIONS[row * 3 + column], offset, brightness), None
