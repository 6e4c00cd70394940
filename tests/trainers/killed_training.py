"""A training that is killed again and again: forked children train, SIGKILL ends each some steps after a checkpoint, the last one ends
by itself. What they began and read is in journal.jsonl."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.trainers.distributed_worker import Inputs, dmd2, supervised
from trainers import parallel
from trainers.loop import Recipe, run

KILLS = 3
STEPS = 12
"""With eight rows of each task these are whole epochs."""
RECIPES: dict[str, Callable[[Inputs], Recipe]] = {
    "supervised": lambda inputs: supervised(inputs, steps=STEPS, batch=4, micro_batch=4),
    "dmd2": lambda inputs: dmd2(inputs, steps=STEPS, batch=2, micro_batch=2, fake_warmup_steps=0),
}


def train(name: str, inputs: Inputs, output: Path, journal: Path) -> None:
    """Train with a checkpoint as often as the loop allows; each begun step, the rows it reads and each checkpoint are lines."""

    def note(**event: object) -> None:
        with journal.open("a") as file:
            file.write(json.dumps({"process": os.getpid(), **event}) + "\n")

    recipe = RECIPES[name](inputs)
    step, read = recipe.step, inputs.rows.batch

    def noted_step(index: int) -> dict[str, float]:
        note(step=index)
        return step(index)

    def noted_batch(indices: list[int], positions: list[int], **choices: bool) -> object:
        note(rows=list(zip(indices, positions, strict=True)))
        return read(indices, positions, **choices)

    recipe.step, inputs.rows.batch = noted_step, noted_batch
    run(recipe, steps=STEPS, output=output, label=name, checkpoint_every_s=0.0, on_checkpoint=lambda position, _: note(checkpoint=position))


def main(folder: Path, name: str, seed: int) -> None:
    """Kill KILLS children; this process itself never touches autograd, which a fork forbids."""
    parallel.use_threads(1)
    inputs = torch.load(folder / "inputs.pt", weights_only=False)
    journal, draw = folder / f"{name}.jsonl", random.Random(seed)
    journal.touch()
    for attempt in range(KILLS + 1):
        before = len(journal.read_text().splitlines())
        child = os.fork()
        if child == 0:
            train(name, inputs, folder / name, journal)
            os._exit(0)
        if attempt < KILLS:
            later = draw.randint(1, 5)
            while len(after_checkpoint(journal, before)) <= later:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    raise RuntimeError(f"{name} ended with status {status} before it could be killed: where that is 0, raise STEPS")
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"the last {name} ended with status {status}")


def after_checkpoint(journal: Path, before: int) -> list[str]:
    """Lines of this life from its first checkpoint on."""
    lines = journal.read_text().splitlines()[before:]
    first = next((number for number, line in enumerate(lines) if '"checkpoint"' in line), len(lines))
    return lines[first:]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
