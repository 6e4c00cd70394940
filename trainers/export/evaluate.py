"""Scores a bundle as a phone would run it: exact readings of held-out small-world scenes, per task and edit kind.
Asks the same questions as every training stage, so the loss of export and of int8 is a plain subtraction."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamlite_data import scenes
from trainers.export.runner import Runner
from trainers.export.settings import ExportSettings
from trainers.questions import GRID_IMAGES, Questions, contact_sheet, draw_questions

BATCH = 32


def evaluate_bundle(
    bundle: Path, settings: ExportSettings, variant: str = "int8", seed: int = 0, *, output: Path | None = None
) -> list[dict[str, Any]]:
    """Rows {task, metric, value, n}: generate_exact, edit_exact, both by kind, and seconds_per_image.

    A generated image counts when the verifier reads exactly the prompted scene; an edit when it reads the target and
    everything else kept its place. `seed` draws the noise, the same for every variant, so differences are paired.
    output: folder for grid_generate_<variant>.png and grid_edit_<variant>.png.
    """
    runner = Runner(bundle, variant, settings.threads)
    asked = draw_questions(settings.evaluate_rows, settings.evaluate_seed)
    drawn, seconds = _answer(settings.evaluate_rows, lambda rows: _generate(runner, asked, seed, rows))
    right = [bool(scenes.matches(image, scene)) for image, scene in zip(drawn, asked.wanted, strict=True)]
    counts = [f"{len(scene.objects)}_objects" for scene in asked.wanted]
    rows = _scores("generate", right, counts, seconds)
    if output is not None:
        some = slice(0, GRID_IMAGES)
        sheet = [[image] for image in drawn[some]]
        contact_sheet(sheet, asked.prompts[some], right[some], output / f"grid_generate_{variant}.png")
    if "edit_encoder" not in runner.manifest["graphs"]:
        return rows
    sources = [scenes.render(scene) for scene in asked.sources]
    edited, seconds = _answer(settings.evaluate_rows, lambda rows: _edit(runner, asked, sources, seed, rows))
    triples = zip(asked.sources, edited, asked.targets, strict=True)
    right = [bool(scenes.edit_matches(source, image, target)) for source, image, target in triples]
    if output is not None:
        sheet = [[source, image] for source, image in zip(sources[some], edited[some], strict=True)]
        contact_sheet(sheet, asked.instructions[some], right[some], output / f"grid_edit_{variant}.png")
    return rows + _scores("edit", right, asked.kinds, seconds)


def _answer(count: int, call: Any) -> tuple[np.ndarray, float]:
    """All answers in batches, and seconds per image."""
    started = time.perf_counter()
    parts = [call(range(start, min(start + BATCH, count))) for start in range(0, count, BATCH)]
    return np.concatenate(parts), (time.perf_counter() - started) / count


def _generate(runner: Runner, asked: Questions, seed: int, rows: range) -> np.ndarray:
    return runner.generate([asked.prompts[row] for row in rows], [_seed(seed, 0, row) for row in rows])


def _edit(runner: Runner, asked: Questions, sources: list[np.ndarray], seed: int, rows: range) -> np.ndarray:
    instructions = [asked.instructions[row] for row in rows]
    return runner.edit([sources[row] for row in rows], instructions, [_seed(seed, 1, row) for row in rows])


def _scores(task: str, right: Sequence[bool], kinds: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    groups: dict[str, list[bool]] = defaultdict(list)
    for kind, hit in zip(kinds, right, strict=True):
        groups[kind].append(hit)
    rows = [_row(task, f"{task}_exact", float(np.mean(right)), len(right))]
    rows += [_row(task, f"{task}_exact_{kind}", float(np.mean(hits)), len(hits)) for kind, hits in sorted(groups.items())]
    return [*rows, _row(task, "seconds_per_image", seconds, len(right))]


def _row(task: str, metric: str, value: float, n: int) -> dict[str, Any]:
    return {"task": task, "metric": metric, "value": float(value), "n": n}


def _seed(seed: int, task: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, task, index)).generate_state(1, np.uint64)[0])
