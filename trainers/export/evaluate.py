"""Scores a bundle as a phone would run it: exact readings of held-out small-world scenes, per task and edit kind.
Asks the same questions as every training stage, so the loss of export and of int8 is a plain subtraction."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from dreamlite_data import scenes
from trainers.export.runner import Runner
from trainers.export.settings import ExportSettings
from trainers.grading import Evaluation, grade_edited, grade_generated, mean_row
from trainers.questions import GRID_IMAGES, Questions, contact_sheet, draw_questions

BATCH = 32


def evaluate_bundle(
    bundle: Path, settings: ExportSettings, variant: str = "int8", seed: int = 0, *, output: Path | None = None
) -> Evaluation:
    """Scores {task, metric, value, n, low, high}: generate_exact, edit_exact, both by kind and by part, and seconds_per_image; and
    each answer.

    A generated image counts when the verifier reads exactly the prompted scene; an edit when it reads the target and
    everything else kept its place. `seed` draws the noise, the same for every variant, so differences are paired.
    output: folder for grid_generate_<variant>.png and grid_edit_<variant>.png.
    """
    runner = Runner(bundle, variant, settings.threads)
    asked = draw_questions(settings.evaluate_rows, settings.evaluate_seed)
    drawn, seconds = _answer(settings.evaluate_rows, lambda rows: _generate(runner, asked, seed, rows))
    grades = grade_generated(drawn, asked)
    scores, answers = [*grades.rows(), mean_row("generate", "seconds_per_image", [seconds])], grades.answers()
    if output is not None:
        some = slice(0, GRID_IMAGES)
        sheet = [[image] for image in drawn[some]]
        contact_sheet(sheet, asked.prompts[some], grades.right[some], output / f"grid_generate_{variant}.png")
    if "edit_encoder" not in runner.manifest["graphs"]:
        return Evaluation(scores, answers)
    sources = [scenes.render(scene) for scene in asked.sources]
    edited, seconds = _answer(settings.evaluate_rows, lambda rows: _edit(runner, asked, sources, seed, rows))
    grades = grade_edited(edited, asked)
    if output is not None:
        sheet = [[source, image] for source, image in zip(sources[some], edited[some], strict=True)]
        contact_sheet(sheet, asked.instructions[some], grades.right[some], output / f"grid_edit_{variant}.png")
    scores += [*grades.rows(), mean_row("edit", "seconds_per_image", [seconds])]
    return Evaluation(scores, answers + grades.answers())


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


def _seed(seed: int, task: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, task, index)).generate_state(1, np.uint64)[0])
