"""A recipe of one small layer: what the loop drives, without a UNet, so that a test can kill it at any step.
As a program: trains in forked children, kills each with SIGKILL after a drawn number of steps, and lets the last one end."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from dreamlite_data.strict_settings import StrictSettings
from trainers.flow import keyed_normal
from trainers.loop import Ema, run

BATCH = 4
STEPS = 80
KILLS = 4


class ToySettings(StrictSettings):
    batch: int = BATCH


class ToyRecipe:
    """Learns to copy; every row is keyed by its global position, as in the real recipes. Each step and each checkpoint is a
    line in `journal`."""

    def __init__(self, journal: Path | None = None, pause_s: float = 0.0) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(6, 6)
        self.modules, self.optimizers = {"net": self.net}, {"net": torch.optim.AdamW(self.net.parameters(), lr=1e-2)}
        self.ema, self.settings, self.key = Ema(self.net, 0.9), ToySettings(), (3,)
        self.journal, self.pause_s = journal, pause_s

    def step(self, index: int) -> dict[str, float]:
        positions = list(range(index * BATCH, (index + 1) * BATCH))
        self.note(step=index, positions=positions)
        data = keyed_normal(self.key, positions, (6,))
        loss = ((self.net(data) - data) ** 2).mean()
        self.optimizers["net"].zero_grad()
        loss.backward()
        self.optimizers["net"].step()
        self.ema.update(self.net)
        time.sleep(self.pause_s)
        return {"loss": loss.item()}

    def note(self, **event: object) -> None:
        if self.journal is not None:
            with self.journal.open("a") as file:
                file.write(json.dumps({"process": os.getpid(), **event}) + "\n")


def train(output: Path, journal: Path | None = None, steps: int = STEPS, pause_s: float = 0.0) -> ToyRecipe:
    """Train with a checkpoint as often as the loop allows."""
    recipe = ToyRecipe(journal, pause_s)
    run(
        recipe, steps=steps, output=output, label="toy", checkpoint_every_s=0.0,
        on_checkpoint=lambda position, _: recipe.note(checkpoint=position),
    )  # fmt: skip
    return recipe


def main(folder: Path, seed: int) -> None:
    """Kill KILLS children, each some steps after its start; this process itself never touches autograd, which a fork forbids."""
    torch.set_num_threads(1)
    journal, draw = folder / "journal.jsonl", random.Random(seed)
    for attempt in range(KILLS + 1):
        before = len(journal.read_text().splitlines()) if journal.exists() else 0
        child = os.fork()
        if child == 0:
            train(folder / "killed", journal, pause_s=0.02)
            os._exit(0)
        if attempt < KILLS:
            wanted = before + draw.randint(2, 20)
            while not journal.exists() or len(journal.read_text().splitlines()) < wanted:
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
