"""Measure a small-world reward model on held-out scenes: how often it prefers the right image or words, by kind of wrong.
It loads the saved checkpoint as users do, so what is measured is what ships."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dreamlite_data import scenes
from dreamlite_data.rewards import load_reward
from trainers.components.reward_pairs import (
    CANDIDATES,
    DEGRADATIONS,
    VARIANTS,
    Picture,
    draw_scene,
    mistakes,
    vary,
    wrong_candidate,
)

Compared = tuple[str, tuple[Image.Image, str, Image.Image | None], tuple[Image.Image, str, Image.Image | None]]


def as_image(picture: Picture) -> Image.Image:
    """8-bit image of a picture."""
    return Image.fromarray(np.rint(picture.pixels).astype(np.uint8))


def generate_pairs(rows: int, seed: int) -> list[Compared]:
    """(kind, right, wrong) of (image, caption): wrong words for the image, a wrong image for the words, a spoilt image."""
    rng = np.random.default_rng((seed, 999_983))
    pairs: list[Compared] = []
    for index in range(rows):
        scene = draw_scene(rng, measured=True)
        while True:
            other, kind = vary(scene, rng, VARIANTS[index % len(VARIANTS)])
            if mistakes(scene, other):
                break
        image, text = as_image(Picture.of(scene, rng)), scenes.caption(scene, rng)
        pairs.append((f"words_{kind}", (image, text, None), (image, scenes.caption(other, rng), None)))
        pairs.append((f"image_{kind}", (image, text, None), (as_image(Picture.of(other, rng)), text, None)))
        fault = DEGRADATIONS[index % len(DEGRADATIONS)]
        pairs.append((f"spoilt_{fault}", (image, text, None), (as_image(Picture.of(scene, rng, fault)), text, None)))
    return pairs


def edit_pairs(rows: int, seed: int) -> list[Compared]:
    """(kind, right, wrong) of (edited image, instruction, source): wrong targets of every kind."""
    rng = np.random.default_rng((seed, 999_979))
    pairs: list[Compared] = []
    for index in range(rows):
        source = draw_scene(rng, measured=True)
        edit = scenes.sample_edit(source, rng)
        text = scenes.instruction(edit, source, rng)
        before = as_image(Picture.of(source, rng))
        right = (as_image(Picture.of(scenes.apply_edit(source, edit), rng)), text, before)
        kind = CANDIDATES[index % len(CANDIDATES)]
        if kind == "spoilt":
            fault = DEGRADATIONS[(index // len(CANDIDATES)) % len(DEGRADATIONS)]
            wrong, kind = Picture.of(scenes.apply_edit(source, edit), rng, fault), f"spoilt_{fault}"
        else:
            scene, _, kind = wrong_candidate(source, edit, rng, kind)
            wrong = Picture.of(scene, rng)
        pairs.append((kind, right, (as_image(wrong), text, before)))
        pairs.append((f"edit_{edit.kind}", right, (as_image(Picture.of(source, rng)), text, before)))
    return pairs


def pair_accuracy(model_dir: Path, *, rows: int, seed: int) -> dict[str, float]:
    """Share of held-out pairs in which the right side scores higher: `pair_accuracy` overall, and by kind."""
    model = load_reward(model_dir)
    pairs = (generate_pairs if model.kind == "hpsv3" else edit_pairs)(rows, seed)
    sides = [side for _, *both in pairs for side in both]
    sources = None if model.kind == "hpsv3" else [each[2] for each in sides]
    scores = model.score([each[0] for each in sides], [each[1] for each in sides], sources)
    won = scores.mu[0::2] > scores.mu[1::2]
    kinds = np.array([kind for kind, *_ in pairs])
    metrics = {"pair_accuracy": float(won.mean())}
    return metrics | {str(kind): round(float(won[kinds == kind].mean()), 4) for kind in np.unique(kinds)}
