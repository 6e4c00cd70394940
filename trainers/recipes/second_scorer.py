"""A second scorer that training does not follow: where it falls while the first one rises, the first is being hacked.
Both are compared with the start model on the same prompts from the same noise, so that a hard batch alone stops nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn

from dreamlite_data.rewards import Scorer
from trainers.settings import ReFLSettings

LEAST_SPREAD = 1e-6
"""A scorer that gives every image of a batch one number has no standard deviation to measure by."""


class HackingWatch(nn.Module):
    """The last comparisons of each task. They are buffers, so that a checkpoint holds them and a resumed run decides alike."""

    def __init__(self, scorers: dict[str, Scorer], settings: ReFLSettings) -> None:
        super().__init__()
        self.scorers, self.settings = dict(scorers), settings
        for task in self.scorers:
            # Rows of (gain of the reward, gain of the second scorer), the newest last.
            self.register_buffer(f"gains_{task}", torch.full((settings.second_window, 2), torch.nan))

    def due(self, task: str, turn: int) -> bool:
        """Whether step `turn` of a task, counted from 0, is one after which it is compared."""
        return task in self.scorers and (turn + 1) % self.settings.second_every == 0

    def second_gain(self, task: str, now: torch.Tensor, start: torch.Tensor, prompts: Sequence[str], sources: torch.Tensor | None) -> float:
        """How far the second scorer's mean has moved from the start model's images [B, 3, H, W] to those of now, in the standard
        deviations of the former. Raises RuntimeError where it cannot score an image."""
        before, after = (self._scores(task, images, prompts, sources) for images in (start, now))
        return float((after.mean() - before.mean()) / max(before.std(), LEAST_SPREAD))

    def _scores(self, task: str, images: torch.Tensor, prompts: Sequence[str], sources: torch.Tensor | None) -> np.ndarray:
        scores = self.scorers[task].score(pictures(images), list(prompts), None if sources is None else pictures(sources))
        failed = [error for error in scores.errors if error is not None]
        if failed:
            raise RuntimeError(f"the second scorer of {task!r} could not score an image: {failed[0]}")
        return scores.mu.astype(np.float64)

    def record(self, task: str, reward_gain: float, second_gain: float) -> dict[str, float]:
        """Keep a comparison, both gains in standard deviations of the start model. Returns what to log."""
        gains = getattr(self, f"gains_{task}")
        gains.copy_(torch.cat([gains[1:], torch.tensor([[reward_gain, second_gain]])]))
        return {f"reward_{task}_gain": reward_gain, f"second_{task}_gain": second_gain}

    def stop_reason(self) -> str | None:
        """Why training must stop: over a full window the reward rose and the second scorer fell by `second_drop` or more."""
        for task, scorer in self.scorers.items():
            gains = getattr(self, f"gains_{task}")
            if gains.isnan().any():
                continue
            reward, second = gains.mean(0).tolist()
            if reward > 0 and second <= -self.settings.second_drop:
                return (
                    f"the reward of {task!r} rose by {reward:.2f} standard deviations while the second scorer ({scorer.kind}) fell by "
                    f"{-second:.2f}: the reward is being hacked. Train with a smaller reward_weight or a larger velocity_weight"
                )
        return None


def pictures(images01: torch.Tensor) -> list[Image.Image]:
    """Images [B, 3, H, W] in about [0, 1] as people and scorers would see them: clamped, in 8 bits."""
    values = (images01.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(value) for value in values]
