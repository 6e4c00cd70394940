"""Scores a bundle as a phone would run it: exact readings of held-out small-world scenes, per task and edit kind.
No torch: what is measured is the artifact, not the model it came from."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from dreamlite_data import scenes
from trainers.export.runner import Runner
from trainers.export.settings import ExportSettings

HELD_OUT = 0x65_76_61_6C
"""Joins the seed so that these scenes come from a stream of their own, apart from every training draw."""
BATCH = 32


def evaluate_bundle(bundle: Path, settings: ExportSettings, variant: str = "int8", seed: int = 0) -> list[dict[str, Any]]:
    """Rows {task, metric, value, n}: generate_exact, edit_exact, edit_exact_<kind> and seconds_per_image.

    A generated image counts when the verifier reads exactly the prompted scene; an edit when it reads the target and
    everything else kept its place. Both variants see the same scenes and seeds, so their difference is paired.
    """
    runner = Runner(bundle, variant, settings.threads)
    rng = np.random.default_rng((seed, HELD_OUT))
    count = settings.evaluate_rows
    wanted = [scenes.sample_scene(rng) for _ in range(count)]
    captions = [scenes.caption(scene, rng) for scene in wanted]
    started = time.perf_counter()
    right = 0
    for start in range(0, count, BATCH):
        part = range(start, min(start + BATCH, count))
        images = runner.generate([captions[index] for index in part], [_seed(seed, 0, index) for index in part])
        right += sum(scenes.matches(image, wanted[index]) for image, index in zip(images, part, strict=True))
    rows = [
        _row("generate", "generate_exact", right / count, count),
        _row("generate", "seconds_per_image", (time.perf_counter() - started) / count, count),
    ]
    if "edit_encoder" not in runner.manifest["graphs"]:
        return rows
    edits = [scenes.sample_edit(scene, rng) for scene in wanted]
    texts = [scenes.instruction(edit, scene, rng) for edit, scene in zip(edits, wanted, strict=True)]
    targets = [scenes.apply_edit(scene, edit) for edit, scene in zip(edits, wanted, strict=True)]
    kinds: dict[str, list[bool]] = defaultdict(list)
    started = time.perf_counter()
    for start in range(0, count, BATCH):
        part = range(start, min(start + BATCH, count))
        sources = [scenes.render(wanted[index]) for index in part]
        images = runner.edit(sources, [texts[index] for index in part], [_seed(seed, 1, index) for index in part])
        for image, index in zip(images, part, strict=True):
            kinds[edits[index].kind].append(bool(scenes.edit_matches(wanted[index], image, targets[index])))
    total = [hit for hits in kinds.values() for hit in hits]
    rows.append(_row("edit", "edit_exact", float(np.mean(total)), count))
    rows += [_row("edit", f"edit_exact_{kind}", float(np.mean(hits)), len(hits)) for kind, hits in sorted(kinds.items())]
    rows.append(_row("edit", "seconds_per_image", (time.perf_counter() - started) / count, count))
    return rows


def _row(task: str, metric: str, value: float, n: int) -> dict[str, Any]:
    return {"task": task, "metric": metric, "value": float(value), "n": n}


def _seed(seed: int, task: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, task, index)).generate_state(1, np.uint64)[0])
