"""Which of an image's captions a training step sees: a weighted draw by similarity, fixed by (row id, epoch, seed).
The view `caption_choices` computes the same probabilities in SQL."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

THRESHOLD = 25.0
"""Lowest CLIP score (100 times the cosine) that takes part in the draw: SANA's 512 px configuration (NVlabs/Sana).
For a CLIP model; SigLIP's cosines are smaller, and with this threshold always the best caption would be drawn."""
TEMPERATURE = 0.1
"""SANA's: at 0.1 a score of 30 against 27 is drawn 2.9 times as often."""


@dataclasses.dataclass(frozen=True)
class CaptionChoice:
    """One caption of an image; `clip_score` is None where no similarity was measured."""

    caption_id: str
    style: str
    text: str
    clip_score: float | None


def draw_probabilities(
    choices: Sequence[CaptionChoice], threshold: float = THRESHOLD, temperature: float = TEMPERATURE
) -> np.ndarray:
    """float64 [len(choices)], summing to 1: proportional to score^(1 / temperature) among the captions whose score reaches
    `threshold` (SANA, sana_data.py). Where none does, the best scored one is certain; where none is scored, the provider's;
    else the first by id. Raises ValueError without choices."""
    if not choices:
        raise ValueError("an image without captions has none to draw from")
    # A score of zero or less has no power to raise: it never takes part, whatever the threshold.
    passing = np.array([one.clip_score is not None and one.clip_score >= threshold and one.clip_score > 0 for one in choices])
    if passing.any():
        scores = np.array([one.clip_score if taken else 0.0 for one, taken in zip(choices, passing, strict=True)], dtype=np.float64)
        weights = np.where(passing, (scores / scores.max()) ** (1.0 / temperature), 0.0)
        return weights / weights.sum()
    best = min(range(len(choices)), key=lambda index: _fallback_order(choices[index]))
    return np.eye(len(choices))[best]


def _fallback_order(choice: CaptionChoice) -> tuple:
    scored = choice.clip_score is not None
    return (not scored, -choice.clip_score if scored else 0.0, choice.style != "provider", choice.caption_id)


def draw_caption(
    choices: Sequence[CaptionChoice],
    row_id: str,
    epoch: int,
    seed: int,
    threshold: float = THRESHOLD,
    temperature: float = TEMPERATURE,
) -> CaptionChoice:
    """The caption of `row_id` in this epoch. The order of `choices` does not matter, nor does any other row: the draw is a
    hash of the three, laid on the cumulative probabilities in order of caption id."""
    ordered = sorted(choices, key=lambda one: one.caption_id)
    upper = np.cumsum(draw_probabilities(ordered, threshold, temperature))
    digest = hashlib.sha256(f"caption:{seed}:{epoch}:{row_id}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    return ordered[min(int(np.searchsorted(upper, draw, side="right")), len(ordered) - 1)]
