"""Judge a checkpoint: exact-match rates read by the scene verifier, mean rewards, held-out velocity loss.
Prompts, edits and seeds are fixed by the settings, so every stage answers the same questions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dreamlite_data import scenes
from dreamlite_data.lake import Lake
from dreamlite_data.rewards import RewardModel, load_reward
from trainers.conditioning import as_image
from trainers.data import TrainingRows, encoders_digest
from trainers.device import CPU
from trainers.flow import interpolate, keyed_normal, predict
from trainers.grading import Evaluation, Grades, Row, grade_edited, grade_generated, mean_row
from trainers.inference import Sampler
from trainers.parallel import map_threads
from trainers.questions import GRID_IMAGES, Questions, contact_sheet, draw_questions
from trainers.settings import EvaluateSettings

SCORE_ROWS = 32
VELOCITY_BATCH = 32
VELOCITY_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a checkpoint drew for every question, uint8 [seeds * N, H, W, 3] each, the questions in turn for each seed, and how
    the verifier grades it."""

    questions: Questions
    sources: list[Image.Image]
    drawn: np.ndarray
    edited: np.ndarray
    drawn_grades: Grades
    edited_grades: Grades

    @property
    def pictures(self) -> dict[str, np.ndarray]:
        """The answers by task."""
        return {"generate": self.drawn, "edit": self.edited}


def evaluate_checkpoint(
    checkpoint: Path,
    settings: EvaluateSettings,
    *,
    components: Path,
    lake: Lake,
    datasets: Mapping[str, int | None],
    output: Path,
    teacher: Path | None = None,
    device: torch.device = CPU,
) -> Evaluation:
    """Scores and answers of a checkpoint; pictures and scores.json go to `output`.

    `teacher` is the checkpoint that a distilled one is measured against, in the same number of steps.

    A distilled checkpoint has no velocity loss: its network is no longer the velocity of a path.
    """
    sampler = Sampler.load(checkpoint, device)
    rewards = {task: load_reward(components / "rewards" / task, device) for task in ("generate", "edit")}
    judged = evaluate_images(sampler, rewards, settings, output, Sampler.load(teacher, device) if teacher else None)
    if sampler.distilled_steps is None:
        rows = TrainingRows(
            lake,
            [(name, datasets[name]) for name in ("t2i", "edit")],
            split=settings.split or "heldout",
            vae=sampler.vae,
            encoder=sampler.encoder,
            components_digest=encoders_digest(components),
            size_px=sampler.size_px,
            limit=settings.velocity_rows,
        )
        judged.scores.extend(velocity_loss(sampler, rows, settings))
    return judged


def answer(sampler: Sampler, settings: EvaluateSettings, steps: int | None = None) -> Answers:
    """Draw the answers to all questions, in `steps` steps (default: the settings'), and grade them."""
    questions = draw_questions(settings.prompts, settings.seed)
    seeds = list(range(settings.prompts * settings.seeds))
    steps = settings.steps if steps is None else steps
    scales = {"guidance_scale": settings.guidance_scale, "image_guidance_scale": settings.image_guidance_scale}
    prompts, instructions = (asked * settings.seeds for asked in (questions.prompts, questions.instructions))
    drawn = sampler.generate(prompts, seeds, steps=steps, guidance_scale=settings.guidance_scale)
    sources = [as_image(scenes.render(scene)) for scene in questions.sources] * settings.seeds
    edited = sampler.edit(sources, instructions, seeds, steps=steps, **scales)
    return Answers(questions, sources, drawn, edited, grade_generated(drawn, questions), grade_edited(edited, questions))


def evaluate_images(
    sampler: Sampler, rewards: dict[str, RewardModel], settings: EvaluateSettings, output: Path, teacher: Sampler | None = None
) -> Evaluation:
    """Answer all questions and write grid_generate.png, grid_edit.png and scores.json.

    Scores are rows (task, metric, value, n, low, high): the exact rates, overall, by kind and by part, the mean rewards, and those of
    the true answers seen through the VAE, which show how much there is left to gain. For a distilled `sampler` its `teacher` answers
    too, guided and in the student's number of steps: what distillation has to beat. Answers are those of `sampler`.
    """
    found = answer(sampler, settings)
    given = _rewards(found, rewards, found.pictures)
    rows = _scores("", found, given) + _truth_scores(sampler, found, rewards)
    if teacher is not None:
        theirs = answer(teacher, settings, sampler.distilled_steps)
        rows += _scores("teacher_", theirs, _rewards(theirs, rewards, theirs.pictures))
    output.mkdir(parents=True, exist_ok=True)
    shown = slice(0, min(GRID_IMAGES, settings.prompts))  # of the first seed alone
    prompts, instructions = found.questions.prompts[shown], found.questions.instructions[shown]
    contact_sheet([[image] for image in found.drawn[shown]], prompts, found.drawn_grades.right[shown], output / "grid_generate.png")
    pairs = [[np.asarray(source), image] for source, image in zip(found.sources[shown], found.edited[shown], strict=True)]
    contact_sheet(pairs, instructions, found.edited_grades.right[shown], output / "grid_edit.png")
    (output / "scores.json").write_text(json.dumps(rows, indent=2))
    answers = [row for grades in (found.drawn_grades, found.edited_grades) for row in grades.answers(given.get(grades.task))]
    return Evaluation(rows, answers)


def _scores(prefix: str, found: Answers, given: dict[str, list[float]]) -> list[Row]:
    """The rates of each task, and the mean reward of each that has one."""
    rows = found.drawn_grades.rows(prefix) + found.edited_grades.rows(prefix)
    return rows + [mean_row(task, f"{prefix}reward_{task}", values) for task, values in given.items()]


def _truth_scores(sampler: Sampler, found: Answers, rewards: dict[str, RewardModel]) -> list[Row]:
    """The mean rewards of what was asked for, drawn exactly and taken through the VAE."""
    asked = {"generate": found.questions.wanted, "edit": found.questions.targets}
    drawn = {task: sampler.round_trip([as_image(scenes.render(scene)) for scene in asked[task]]) for task in rewards}
    return [mean_row(task, f"reward_{task}_of_truth", values) for task, values in _rewards(found, rewards, drawn).items()]


def _rewards(found: Answers, rewards: dict[str, RewardModel], pictures: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """By task that has a reward model, the reward of each of its pictures of all questions, once or several times in turn."""
    asked = {"generate": (found.questions.prompts, None), "edit": (found.questions.instructions, found.sources)}
    given = {}
    for task, reward in rewards.items():
        images, (texts, sources) = pictures[task], asked[task]
        texts = texts * (len(images) // len(texts))
        given[task] = score_side_by_side(reward, images, texts, sources and sources[: len(images)])
    return given


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
def velocity_loss(sampler: Sampler, rows: TrainingRows, settings: EvaluateSettings) -> list[Row]:
    """Held-out flow-matching loss per task on a fixed grid of times and keyed noise, without foreground weight."""
    results = []
    for task, indices in rows.by_task.items():
        chosen = indices[: settings.velocity_rows]

        def losses_of(start: int, chosen: list[int] = chosen) -> list[float]:
            part = chosen[start : start + VELOCITY_BATCH]
            data = rows.batch(part, list(range(start, start + len(part)))).to(sampler.device)
            times = torch.tensor([VELOCITY_TIMES[position % len(VELOCITY_TIMES)] for position in data.positions], device=data.device)
            noise = keyed_normal((settings.seed, 6), data.positions, tuple(data.latents.shape[1:]), data.device)
            velocity = predict(
                sampler.unet, interpolate(data.latents, noise, times), times, data.condition, data.text, data.size_px
            )
            return ((velocity - (noise - data.latents)) ** 2).mean(dim=(1, 2, 3)).tolist()

        losses = [loss for part in map_threads(losses_of, range(0, len(chosen), VELOCITY_BATCH)) for loss in part]
        if losses:
            results.append(mean_row(task, "velocity_loss", losses))
    return results
