"""The held-out questions that every stage and every bundle answers, and the sheet that shows the answers.
Free of torch, so that a change in training does not count as a change of the questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dreamlite_data import scenes

GRID_IMAGES = 16


@dataclasses.dataclass(frozen=True)
class Questions:
    """Held-out prompts with the scenes they ask for, and held-out edits with sources and exact targets. `name` is that of the
    draw: questions with the same place in draws of the same name are the same."""

    name: str
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
        name=f"{seed}-{count}",
        prompts=[scenes.caption(scene, rng) for scene in wanted],
        wanted=wanted,
        sources=sources,
        kinds=[edit.kind for edit in edits],
        instructions=[scenes.instruction(edit, scene, rng) for edit, scene in zip(edits, sources, strict=True)],
        targets=[scenes.apply_edit(scene, edit) for edit, scene in zip(edits, sources, strict=True)],
    )


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
            sheet.paste(Image.fromarray(np.asarray(image), "RGB").resize((side, side), Image.Resampling.NEAREST), (left + place * side, top))
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
