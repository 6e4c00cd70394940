"""Pictures of two checkpoints side by side, drawn from the same prompts and noise: what a training changed, for people.
A row is a prompt; its pictures are the source (of an edit), before, and after."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from trainers.data import square
from trainers.device import CPU
from trainers.inference import Sampler
from trainers.settings import EvaluateSettings

TILE_PX = 320
LINE_PX = 14
LINES = 2


def draw_before_after(
    before: Path,
    after: Path,
    texts: Sequence[str],
    sources: Sequence[Image.Image] | None,
    settings: EvaluateSettings,
    path: Path,
    device: torch.device = CPU,
) -> float:
    """Write the sheet of `texts` (prompts, or with `sources` instructions) and return the mean difference of a pixel, in 0 .. 255."""
    drawn = [_draw(Sampler.load(checkpoint, device), texts, sources, settings) for checkpoint in (before, after)]
    cells = [[Image.fromarray(images[index]) for images in drawn] for index in range(len(texts))]
    if sources is not None:
        cells = [[square(source, TILE_PX), *row] for source, row in zip(sources, cells, strict=True)]
    font, height = ImageFont.load_default(size=12), TILE_PX + LINES * LINE_PX + 10
    sheet = Image.new("RGB", (len(cells[0]) * (TILE_PX + 6), len(cells) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (row, text) in enumerate(zip(cells, texts, strict=True)):
        for place, image in enumerate(row):
            sheet.paste(image.resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS), (place * (TILE_PX + 6), number * height))
        words = textwrap.wrap(text, len(row) * TILE_PX // 7, max_lines=LINES)
        pen.text((2, number * height + TILE_PX + 2), "\n".join(words), fill="black", font=font)
    sheet.save(path)
    return float(np.abs(drawn[0].astype(np.int16) - drawn[1]).mean())


def _draw(sampler: Sampler, texts: Sequence[str], sources: Sequence[Image.Image] | None, settings: EvaluateSettings) -> np.ndarray:
    seeds = range(len(texts))
    if sources is None:
        return sampler.generate(texts, seeds, steps=settings.steps, guidance_scale=settings.guidance_scale, batch=1)
    return sampler.edit(
        sources, texts, seeds, steps=settings.steps, guidance_scale=settings.guidance_scale,
        image_guidance_scale=settings.image_guidance_scale, batch=1,
    )  # fmt: skip
