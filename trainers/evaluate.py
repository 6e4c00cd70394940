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
from PIL import Image, ImageDraw, ImageFont

from dreamlite_data import scenes
from dreamlite_data.rewards import RewardModel
from trainers.conditioning import as_image
from trainers.data import TrainingRows
from trainers.flow import interpolate, keyed_normal, predict
from trainers.inference import Sampler
from trainers.settings import EvaluateSettings

GRID_IMAGES = 16
VELOCITY_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclasses.dataclass(frozen=True)
class Questions:
    """Held-out prompts with the scenes they ask for, and held-out edits with sources and exact targets."""

    prompts: list[str]
    wanted: list[scenes.Scene]
    sources: list[scenes.Scene]
    kinds: list[str]
    instructions: list[str]
    targets: list[scenes.Scene]


def draw_questions(count: int, seed: int) -> Questions:
    """`count` prompts and `count` edits, the eight kinds in turn; a pure function of the seed."""
    rng = np.random.default_rng((seed, 5))
    wanted = [scenes.sample_scene(rng) for _ in range(count)]
    sources, edits = [], []
    for index in range(count):
        kind = scenes.EDIT_KINDS[index % len(scenes.EDIT_KINDS)]
        objects = {"add": (1, 3), "remove": (2, 4)}.get(kind, (1, 4))
        scene = scenes.sample_scene(rng, object_count=int(rng.integers(*objects)))
        sources.append(scene)
        edits.append(scenes.sample_edit(scene, rng, kind))
    return Questions(
        prompts=[scenes.caption(scene, rng) for scene in wanted],
        wanted=wanted,
        sources=sources,
        kinds=[edit.kind for edit in edits],
        instructions=[scenes.instruction(edit, scene, rng) for edit, scene in zip(edits, sources, strict=True)],
        targets=[scenes.apply_edit(scene, edit) for edit, scene in zip(edits, sources, strict=True)],
    )


def evaluate_images(
    sampler: Sampler, rewards: dict[str, RewardModel], settings: EvaluateSettings, output: Path
) -> list[dict[str, object]]:
    """Draw the answers to all questions, grade them, and write grid_generate.png, grid_edit.png and scores.json.

    Returns rows (task, metric, value, n): the exact rates, overall and by kind, and the mean rewards.
    """
    questions = draw_questions(settings.prompts, settings.seed)
    seeds = list(range(settings.prompts))
    drawn = sampler.generate(
        questions.prompts, seeds, steps=settings.steps, guidance_scale=settings.guidance_scale
    )
    sources = [as_image(scenes.render(scene)) for scene in questions.sources]
    edited = sampler.edit(
        sources,
        questions.instructions,
        seeds,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        image_guidance_scale=settings.image_guidance_scale,
    )
    right = [scenes.matches(image, scene) for image, scene in zip(drawn, questions.wanted, strict=True)]
    edit_right = [
        scenes.edit_matches(source, image, target)
        for source, image, target in zip(questions.sources, edited, questions.targets, strict=True)
    ]
    rows = [_row("generate", "generate_exact", right), _row("edit", "edit_exact", edit_right)]
    counts = [f"{len(scene.objects)}_objects" for scene in questions.wanted]
    rows += _by_group("generate", "generate_exact", counts, right)
    rows += _by_group("edit", "edit_exact", questions.kinds, edit_right)
    if "generate" in rewards:
        scores = rewards["generate"].score([as_image(image) for image in drawn], questions.prompts)
        rows.append(_row("generate", "reward_generate", scores.mu.tolist()))
    if "edit" in rewards:
        scores = rewards["edit"].score([as_image(image) for image in edited], questions.instructions, sources)
        rows.append(_row("edit", "reward_edit", scores.mu.tolist()))
    output.mkdir(parents=True, exist_ok=True)
    shown = slice(0, GRID_IMAGES)
    contact_sheet(
        [[image] for image in drawn[shown]], questions.prompts[shown], right[shown], output / "grid_generate.png"
    )
    pairs = [[np.asarray(source), image] for source, image in zip(sources[shown], edited[shown], strict=True)]
    contact_sheet(pairs, questions.instructions[shown], edit_right[shown], output / "grid_edit.png")
    (output / "scores.json").write_text(json.dumps(rows, indent=2))
    return rows


@torch.no_grad()
def velocity_loss(
    sampler: Sampler, rows: TrainingRows, settings: EvaluateSettings, batch: int = 64
) -> list[dict[str, object]]:
    """Held-out flow-matching loss per task on a fixed grid of times and keyed noise, without foreground weight."""
    results = []
    for task, indices in rows.by_task.items():
        losses = []
        chosen = indices[: settings.velocity_rows]
        for start in range(0, len(chosen), batch):
            part = chosen[start : start + batch]
            data = rows.batch(part, list(range(start, start + len(part))))
            times = torch.tensor([VELOCITY_TIMES[position % len(VELOCITY_TIMES)] for position in data.positions])
            noise = keyed_normal((settings.seed, 6), data.positions, tuple(data.latents.shape[1:]))
            velocity = predict(
                sampler.unet, interpolate(data.latents, noise, times), times, data.condition, data.text, rows.size_px
            )
            losses += ((velocity - (noise - data.latents)) ** 2).mean(dim=(1, 2, 3)).tolist()
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


def contact_sheet(
    cells: Sequence[Sequence[np.ndarray]], captions: Sequence[str], right: Sequence[bool], path: Path, scale: int = 2
) -> None:
    """Draw cells of one or more images side by side, a frame in green (read as asked) or red, and the text below."""
    font = ImageFont.load_default(size=11)
    width = max(len(cell) for cell in cells) * scenes.CANVAS_PX * scale
    tile, text_px, columns = max(width, 190) + 14, 46, 4 if len(cells[0]) == 1 else 3
    height = scenes.CANVAS_PX * scale + text_px + 14
    sheet = Image.new("RGB", (columns * tile, -(-len(cells) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (cell, caption, good) in enumerate(zip(cells, captions, right, strict=True)):
        left, top = index % columns * tile + 6, index // columns * height + 6
        draw.rectangle((left - 3, top - 3, left + width + 2, top + scenes.CANVAS_PX * scale + 2), fill="#1a8f3c" if good else "#c62828")
        for place, image in enumerate(cell):
            side = scenes.CANVAS_PX * scale
            sheet.paste(as_image(np.asarray(image)).resize((side, side), Image.Resampling.NEAREST), (left + place * side, top))
        for line, words in enumerate(_wrapped(caption, font, tile - 14)[:3]):
            draw.text((left, top + scenes.CANVAS_PX * scale + 5 + line * 13), words, fill="black", font=font)
    sheet.save(path)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> list[str]:
    lines, current = [], ""
    for word in text.split():
        longer = f"{current} {word}".strip()
        if font.getlength(longer) > width_px and current:
            lines.append(current)
            longer = word
        current = longer
    return [*lines, current]
