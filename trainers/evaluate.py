"""Judge a checkpoint: exact-match rates read by the scene verifier, mean rewards, held-out velocity loss.
Prompts, edits and seeds are fixed by the settings, so every stage answers the same questions."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dreamlite_data import scenes
from dreamlite_data.rewards import RewardModel
from trainers.conditioning import as_image
from trainers.data import TrainingRows
from trainers.flow import interpolate, keyed_normal, predict
from trainers.inference import Sampler
from trainers.parallel import map_threads
from trainers.questions import GRID_IMAGES, Questions, contact_sheet, draw_questions
from trainers.settings import EvaluateSettings

SCORE_ROWS = 32
VELOCITY_BATCH = 32
VELOCITY_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a checkpoint drew for every question, uint8 [N, H, W, 3] each, and which of it the verifier reads as asked."""

    questions: Questions
    sources: list[Image.Image]
    drawn: np.ndarray
    edited: np.ndarray
    drawn_right: list[bool]
    edited_right: list[bool]


def answer(sampler: Sampler, settings: EvaluateSettings, steps: int | None = None) -> Answers:
    """Draw the answers to all questions, in `steps` steps (default: the settings'), and grade them."""
    questions = draw_questions(settings.prompts, settings.seed)
    seeds = list(range(settings.prompts))
    steps = settings.steps if steps is None else steps
    scales = {"guidance_scale": settings.guidance_scale, "image_guidance_scale": settings.image_guidance_scale}
    drawn = sampler.generate(questions.prompts, seeds, steps=steps, guidance_scale=settings.guidance_scale)
    sources = [as_image(scenes.render(scene)) for scene in questions.sources]
    edited = sampler.edit(sources, questions.instructions, seeds, steps=steps, **scales)
    triples = zip(questions.sources, edited, questions.targets, strict=True)
    return Answers(
        questions,
        sources,
        drawn,
        edited,
        [scenes.matches(image, scene) for image, scene in zip(drawn, questions.wanted, strict=True)],
        [scenes.edit_matches(source, image, target) for source, image, target in triples],
    )


def evaluate_images(
    sampler: Sampler, rewards: dict[str, RewardModel], settings: EvaluateSettings, output: Path, teacher: Sampler | None = None
) -> list[dict[str, object]]:
    """Answer all questions and write grid_generate.png, grid_edit.png and scores.json.

    Returns rows (task, metric, value, n): the exact rates, overall and by kind, and the mean rewards. For a distilled
    `sampler` its `teacher` answers too, guided and in the student's number of steps: what distillation has to beat.
    """
    found = answer(sampler, settings)
    questions = found.questions
    rows = _scores("", found, rewards)
    counts = [f"{len(scene.objects)}_objects" for scene in questions.wanted]
    rows += _by_group("generate", "generate_exact", counts, found.drawn_right)
    rows += _by_group("edit", "edit_exact", questions.kinds, found.edited_right)
    if teacher is not None:
        rows += _scores("teacher_", answer(teacher, settings, sampler.distilled_steps), rewards)
    output.mkdir(parents=True, exist_ok=True)
    shown = slice(0, GRID_IMAGES)
    contact_sheet(
        [[image] for image in found.drawn[shown]], questions.prompts[shown], found.drawn_right[shown], output / "grid_generate.png"
    )
    pairs = [[np.asarray(source), image] for source, image in zip(found.sources[shown], found.edited[shown], strict=True)]
    contact_sheet(pairs, questions.instructions[shown], found.edited_right[shown], output / "grid_edit.png")
    (output / "scores.json").write_text(json.dumps(rows, indent=2))
    return rows


def _scores(prefix: str, found: Answers, rewards: dict[str, RewardModel]) -> list[dict[str, object]]:
    """The exact rate of each task, and the mean reward of each that has a reward model."""
    rows = [
        _row("generate", f"{prefix}generate_exact", found.drawn_right),
        _row("edit", f"{prefix}edit_exact", found.edited_right),
    ]
    if "generate" in rewards:
        mu = score_side_by_side(rewards["generate"], found.drawn, found.questions.prompts)
        rows.append(_row("generate", f"{prefix}reward_generate", mu))
    if "edit" in rewards:
        mu = score_side_by_side(rewards["edit"], found.edited, found.questions.instructions, found.sources)
        rows.append(_row("edit", f"{prefix}reward_edit", mu))
    return rows


def score_side_by_side(
    reward: RewardModel, images: np.ndarray, prompts: Sequence[str], sources: Sequence[Image.Image] | None = None
) -> list[float]:
    """mu of each image, scored in parts on the threads there are."""

    def score(start: int) -> list[float]:
        rows = slice(start, start + SCORE_ROWS)
        pictures = [as_image(image) for image in images[rows]]
        return reward.score(pictures, prompts[rows], None if sources is None else sources[rows]).mu.tolist()

    return [mu for part in map_threads(score, range(0, len(images), SCORE_ROWS)) for mu in part]


@torch.no_grad()
def velocity_loss(sampler: Sampler, rows: TrainingRows, settings: EvaluateSettings) -> list[dict[str, object]]:
    """Held-out flow-matching loss per task on a fixed grid of times and keyed noise, without foreground weight."""
    results = []
    for task, indices in rows.by_task.items():
        chosen = indices[: settings.velocity_rows]

        def losses_of(start: int, chosen: list[int] = chosen) -> list[float]:
            part = chosen[start : start + VELOCITY_BATCH]
            data = rows.batch(part, list(range(start, start + len(part))))
            times = torch.tensor([VELOCITY_TIMES[position % len(VELOCITY_TIMES)] for position in data.positions])
            noise = keyed_normal((settings.seed, 6), data.positions, tuple(data.latents.shape[1:]))
            velocity = predict(
                sampler.unet, interpolate(data.latents, noise, times), times, data.condition, data.text, data.size_px
            )
            return ((velocity - (noise - data.latents)) ** 2).mean(dim=(1, 2, 3)).tolist()

        losses = [loss for part in map_threads(losses_of, range(0, len(chosen), VELOCITY_BATCH)) for loss in part]
        if losses:
            results.append(_row(task, "velocity_loss", losses))
    return results


def _row(task: str, metric: str, values: Sequence[float]) -> dict[str, object]:
    return {"task": task, "metric": metric, "value": float(np.mean(values)), "n": len(values)}


def _by_group(task: str, metric: str, groups: Sequence[str], values: Sequence[bool]) -> list[dict[str, object]]:
    grouped = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        grouped[group].append(value)
    return [_row(task, f"{metric}_{group}", found) for group, found in sorted(grouped.items())]
