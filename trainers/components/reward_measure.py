"""Measure a small-world reward model on held-out scenes: how often it prefers the right side, by kind of wrong, and how surely.
It loads the saved checkpoint as users do, so what is measured is what ships."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dreamlite_data import scenes
from dreamlite_data.rewards import RewardScores, load_reward
from trainers.components.reward import normal_mean
from trainers.components.reward_pairs import (
    CANDIDATES,
    DEGRADATIONS,
    VARIANTS,
    Picture,
    draw_scene,
    edit_mistakes,
    mistakes,
    vary,
    wrong_candidate,
)

Side = tuple[Image.Image, str, Image.Image | None]
CALIBRATION_BINS = 10


@dataclasses.dataclass(frozen=True)
class Compared:
    """A right and a wrong (image, words, source): what is wrong about it, and which of the model's heads should see that."""

    kind: str
    right: Side
    wrong: Side
    heads: tuple[bool, ...] = (True,)


def as_image(picture: Picture) -> Image.Image:
    """8-bit image of a picture."""
    return Image.fromarray(np.rint(picture.pixels).astype(np.uint8))


def generate_pairs(rows: int, seed: int) -> list[Compared]:
    """Wrong words for the image, a wrong image for the words, a spoilt image."""
    rng = np.random.default_rng((seed, 999_983))
    pairs: list[Compared] = []
    for index in range(rows):
        scene = draw_scene(rng, measured=True)
        while True:
            other, kind = vary(scene, rng, VARIANTS[index % len(VARIANTS)])
            if mistakes(scene, other):
                break
        image, text = as_image(Picture.of(scene, rng)), scenes.caption(scene, rng)
        pairs.append(Compared(f"words_{kind}", (image, text, None), (image, scenes.caption(other, rng), None)))
        pairs.append(Compared(f"image_{kind}", (image, text, None), (as_image(Picture.of(other, rng)), text, None)))
        fault = DEGRADATIONS[index % len(DEGRADATIONS)]
        pairs.append(Compared(f"spoilt_{fault}", (image, text, None), (as_image(Picture.of(scene, rng, fault)), text, None)))
    return pairs


def edit_pairs(rows: int, seed: int) -> list[Compared]:
    """Wrong targets of every kind, and for each kind of edit the source itself."""
    rng = np.random.default_rng((seed, 999_979))
    pairs: list[Compared] = []
    for index in range(rows):
        source = draw_scene(rng, measured=True)
        edit = scenes.sample_edit(source, rng)
        text = scenes.instruction(edit, source, rng)
        before = as_image(Picture.of(source, rng))
        right = (as_image(Picture.of(scenes.apply_edit(source, edit), rng)), text, before)
        kind = list(CANDIDATES)[index % len(CANDIDATES)]
        if kind == "spoilt":
            fault = DEGRADATIONS[(index // len(CANDIDATES)) % len(DEGRADATIONS)]
            wrong, kind = Picture.of(scenes.apply_edit(source, edit), rng, fault), f"spoilt_{fault}"
        else:
            scene, _, kind = wrong_candidate(source, edit, rng, kind)
            wrong = Picture.of(scene, rng)
        asked, rest = edit_mistakes(source, edit, wrong.scene)
        pairs.append(Compared(kind, right, (as_image(wrong), text, before), (asked > 0, rest > 0 or wrong.fault > 0)))
        pairs.append(Compared(f"edit_{edit.kind}", right, (as_image(Picture.of(source, rng)), text, before), (True, False)))
    return pairs


def pair_accuracy(model_dir: Path, *, rows: int, seed: int) -> dict[str, float]:
    """Shares of held-out pairs in which the right side scores higher: `pair_accuracy` overall, by kind of wrong, and, where there
    are several heads, `<head>_accuracy` of each over the pairs that it should tell apart. `calibration_error`: see there."""
    model = load_reward(model_dir)
    pairs = (generate_pairs if model.kind == "hpsv3" else edit_pairs)(rows, seed)
    sides = [side for pair in pairs for side in (pair.right, pair.wrong)]
    sources = None if model.kind == "hpsv3" else [each[2] for each in sides]
    scores = model.score([each[0] for each in sides], [each[1] for each in sides], sources)
    won = scores.mu[0::2] > scores.mu[1::2]
    kinds = np.array([pair.kind for pair in pairs])
    metrics = {"pair_accuracy": float(won.mean()), "calibration_error": calibration_error(scores)}
    if len(model.head_names) > 1:
        right = scores.heads[0::2, :, 0] > scores.heads[1::2, :, 0]
        seen = np.array([pair.heads for pair in pairs])
        metrics |= {f"{name}_accuracy": float(right[seen[:, head], head].mean()) for head, name in enumerate(model.head_names)}
    metrics |= {str(kind): float(won[kinds == kind].mean()) for kind in np.unique(kinds)}
    return {name: round(value, 4) for name, value in metrics.items()}


def calibration_error(scores: RewardScores) -> float:
    """Expected calibration error of rows 0, 2, .. against 1, 3, ..: the mean gap between how sure the model is of a pair (from mu
    and sigma, as the ranking loss reads them) and how often it is right, over bins of equal width, weighted by their pairs."""
    mu, variance = torch.from_numpy(scores.mu), torch.from_numpy(np.exp(2 * scores.log_sigma))
    sure = normal_mean(torch.sigmoid, mu[0::2] - mu[1::2], (variance[0::2] + variance[1::2]).sqrt()).numpy()
    right, confidence = sure > 0.5, np.maximum(sure, 1 - sure)
    bins = np.minimum(((confidence - 0.5) * 2 * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = [abs(right[bins == each].mean() - confidence[bins == each].mean()) * (bins == each).mean() for each in np.unique(bins)]
    return float(sum(gaps))
