"""Write the small world as WebDataset shards, a share of the rows broken on purpose.
The shards look like anybody's: only the truth file beside them knows which rows are broken, and how."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from dreamlite_data import scenes
from dreamlite_data.settings import ScenesSettings

T2I_FAULTS = ("truncated", "zero_bytes", "duplicate", "blurred", "wrong_caption")
EDIT_FAULTS = ("truncated", "zero_bytes", "duplicate", "blurred", "wrong_edit")
BLUR_SIGMA_PX = (1.7, 2.6)
SHARED_SOURCE = 4
"""Every so many edit rows use the previous row's source again, as real edit sets do."""


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard to write: rows `start` to `stop` of `task` ('generate' or 'edit')."""

    task: str
    index: int
    start: int
    stop: int
    settings: ScenesSettings
    seed: int
    folder: str


def plan(settings: ScenesSettings, seed: int, folder: Path) -> list[ShardTask]:
    """The shards of a small world. Rows depend on (seed, task, row) alone, so more rows only add shards."""
    tasks = []
    for task, total in (("generate", settings.t2i_rows), ("edit", settings.edit_rows)):
        for index, start in enumerate(range(0, total, settings.shard_rows)):
            stop = min(total, start + settings.shard_rows)
            tasks.append(ShardTask(task, index, start, stop, settings, seed, str(folder)))
    return tasks


def write_shard(task: ShardTask) -> list[dict[str, Any]]:
    """Write one tar and return the truth of its broken rows: shard, source_key, fault."""
    folder = Path(task.folder) / ("t2i" if task.task == "generate" else "edit")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task.index:05d}.tar"
    truth: list[dict[str, Any]] = []
    members: dict[str, bytes] = {}
    whole: list[dict[str, bytes]] = []
    for row in range(task.start, task.stop):
        key = f"{row:08d}"
        rng = np.random.default_rng([task.seed, task.settings.seed, 0 if task.task == "generate" else 1, row])
        faults = T2I_FAULTS if task.task == "generate" else EDIT_FAULTS
        fault = None
        if rng.random() < task.settings.fault_share:
            fault = faults[int(rng.integers(len(faults)))]
        if fault == "duplicate" and not whole:
            fault = None  # nothing to copy yet
        if fault == "duplicate":
            files = _copy(whole[int(rng.integers(len(whole)))], rng)
        elif task.task == "generate":
            files = _t2i_row(rng, fault)
        else:
            files = _edit_row(task, row, rng, fault)
        if fault is None:
            whole.append(files)
        else:
            truth.append({"shard": path.name, "source_key": key, "fault": fault})
        members |= {f"{key}.{suffix}": payload for suffix, payload in files.items()}
    draft = path.with_suffix(".tmp")
    with tarfile.open(draft, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)  # times and owners stay zero: equal rows give equal bytes
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    draft.replace(path)
    return truth


def _t2i_row(rng: np.random.Generator, fault: str | None) -> dict[str, bytes]:
    scene = scenes.sample_scene(rng)
    words = scenes.caption(scene, rng)
    if fault == "wrong_caption":
        words = scenes.caption(_other_scene(scene, rng), rng)
    payload = _png(_blur(scenes.render(scene), rng) if fault == "blurred" else scenes.render(scene))
    facts = {"scene": json.loads(scene.to_json()), "licence": "CC0-1.0"}
    return {"png": _damage(payload, fault), "txt": words.encode(), "json": json.dumps(facts).encode()}


def _draw_edit(task: ShardTask, row: int) -> tuple[scenes.Scene, scenes.Edit, str]:
    """Scene, edit and instruction of a row. A row that shares its source never repeats the other row's instruction:
    that would be a duplicate nobody planted."""
    shared = row % SHARED_SOURCE == SHARED_SOURCE - 1 and row > task.start
    first = row - shared
    scene = scenes.sample_scene(np.random.default_rng([task.seed, task.settings.seed, 2, first]))
    taken = _draw_edit(task, first)[1] if shared else None
    rng = np.random.default_rng([task.seed, task.settings.seed, 3, row])
    while True:
        edit = scenes.sample_edit(scene, rng)
        if taken is None or scenes.apply_edit(scene, edit).key() != scenes.apply_edit(scene, taken).key():
            return scene, edit, scenes.instruction(edit, scene, rng)


def _edit_row(task: ShardTask, row: int, rng: np.random.Generator, fault: str | None) -> dict[str, bytes]:
    scene, edit, words = _draw_edit(task, row)
    target = scenes.apply_edit(scene, edit)
    source_pixels, target_pixels = scenes.render(scene), scenes.render(target)
    if fault == "wrong_edit":
        # Half the time nothing happened, half the time the picture is of something else.
        target_pixels = source_pixels if rng.integers(2) else scenes.render(_other_scene(target, rng))
    if fault == "blurred":
        target_pixels = _blur(target_pixels, rng)
    broken = "source" if rng.integers(2) else "target"
    facts = {"instruction": words, "edit_type": edit.kind, "licence": "CC0-1.0"}
    return {
        "source.png": _damage(_png(source_pixels), fault if broken == "source" else None),
        "target.png": _damage(_png(target_pixels), fault if broken == "target" else None),
        "json": json.dumps(facts).encode(),
    }


def _other_scene(scene: scenes.Scene, rng: np.random.Generator) -> scenes.Scene:
    while True:
        other = scenes.sample_scene(rng)
        if other.key() != scene.key():
            return other


def _blur(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    sigma = float(rng.uniform(*BLUR_SIGMA_PX))
    return np.rint(ndimage.gaussian_filter(pixels.astype(np.float32), (sigma, sigma, 0))).astype(np.uint8)


def _damage(payload: bytes, fault: str | None) -> bytes:
    if fault == "zero_bytes":
        return b""
    return payload[: len(payload) // 2] if fault == "truncated" else payload


def _copy(files: dict[str, bytes], rng: np.random.Generator) -> dict[str, bytes]:
    """The same sample again: half the time byte for byte, half the time the same pixels written by another encoder."""
    if rng.integers(2):
        return dict(files)
    return {
        suffix: _png(np.asarray(Image.open(io.BytesIO(payload))), level=1) if suffix.endswith("png") else payload
        for suffix, payload in files.items()
    }


def _png(pixels: np.ndarray, level: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()
