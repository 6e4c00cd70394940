"""A recipe of one small layer: what the loop drives, without a UNet.
Every row is keyed by its global position, as in the real recipes."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from dreamlite_data.strict_settings import StrictSettings
from trainers.flow import keyed_normal
from trainers.loop import Ema, run

BATCH = 4


class ToySettings(StrictSettings):
    batch: int = BATCH


class ToyRecipe:
    """Learns to copy."""

    def __init__(self, pause_s: float = 0.0) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(6, 6)
        self.modules, self.optimizers = {"net": self.net}, {"net": torch.optim.AdamW(self.net.parameters(), lr=1e-2)}
        self.ema, self.settings, self.key = Ema(self.net, 0.9), ToySettings(), (3,)
        self.pause_s = pause_s

    def step(self, index: int) -> dict[str, float]:
        positions = list(range(index * BATCH, (index + 1) * BATCH))
        data = keyed_normal(self.key, positions, (6,))
        loss = ((self.net(data) - data) ** 2).mean()
        self.optimizers["net"].zero_grad()
        loss.backward()
        self.optimizers["net"].step()
        self.ema.update(self.net)
        time.sleep(self.pause_s)
        return {"loss": loss.item()}


def train(output: Path, steps: int) -> None:
    """Train with a checkpoint as often as the loop allows."""
    run(ToyRecipe(), steps=steps, output=output, label="toy", checkpoint_every_s=0.0)
