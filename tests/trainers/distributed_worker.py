"""One of the processes of the tests of distribution: trains tiny recipes on the rows that the test made.
Started by torchrun, or by the test itself to be killed; imported by the test for its side of the comparison."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tests.trainers.conftest import TINY_MODEL
from tests.trainers.synthetic import SceneRows
from trainers import parallel
from trainers.distributed import joined, world
from trainers.loop import Recipe, run
from trainers.model import build_unet, load_vae
from trainers.recipes.dmd2 import DMD2Recipe
from trainers.recipes.refl import ReFLRecipe
from trainers.recipes.supervised import SupervisedRecipe
from trainers.settings import DMD2Settings, ReFLSettings, SupervisedSettings

STEPS = 4
JOINT = SupervisedSettings(
    tasks={"generate": 0.5, "edit": 0.5}, datasets=("t2i", "edit"), steps=STEPS, batch=8, micro_batch=2, warmup_steps=1
)
REFL = ReFLSettings(
    steps=STEPS, batch=4, micro_batch=1, rollout_steps=3, hinge="none", reward_weight=1.0, sigma_high=1.0, learning_rate=1e-3
)
DMD2 = DMD2Settings(steps=2, batch=4, micro_batch=1, student_steps=2, fake_steps=1, fake_warmup_steps=1)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the test hands to its processes: rows, encoded once, and the folder of the frozen parts."""

    rows: SceneRows
    components: Path


class Warmth:
    """A reward whose truth is plain: how much red an image holds."""

    def differentiable(self, images: torch.Tensor, prompts: list[str], sources: torch.Tensor | None = None) -> torch.Tensor:
        return (images[:, 0] - images[:, 2]).mean((1, 2))


def unet(seed: int = 0) -> torch.nn.Module:
    return build_unet(TINY_MODEL, 64, 8, seed)


def supervised(inputs: Inputs, optimizer: str = "adamw", key: tuple[int, ...] = (0, 2)) -> SupervisedRecipe:
    return SupervisedRecipe(unet(), inputs.rows, JOINT.model_copy(update={"optimizer": optimizer}), key)


def refl(inputs: Inputs) -> ReFLRecipe:
    rewards = {task: Warmth() for task in ("generate", "edit")}
    return ReFLRecipe(unet(), load_vae(inputs.components), rewards, inputs.rows, REFL, (0, 4))


def dmd2(inputs: Inputs) -> DMD2Recipe:
    return DMD2Recipe(unet(), inputs.rows, DMD2, (0, 5))


RECIPES: dict[str, Callable[[Inputs], Recipe]] = {
    "adamw": supervised,
    "muon": lambda inputs: supervised(inputs, "muon"),
    "refl": refl,
    "dmd2": dmd2,
}


def train(name: str, inputs: Inputs, output: Path, steps: int | None = None) -> Recipe:
    """Train a recipe in all processes there are; its state is in output/state.pt."""
    recipe = RECIPES[name](inputs)
    run(recipe, steps=steps or recipe.settings.steps, output=output, label=name)
    return recipe


def main(folder: Path) -> None:
    """Every recipe, then supervised training with a key of each process's own: the mistake that the test must notice."""
    inputs = torch.load(folder / "inputs.pt", weights_only=False)
    parallel.use_threads(1)
    with joined() as here:
        for name in RECIPES:
            train(name, inputs, folder / f"{name}_of_{here.size}")
        run(supervised(inputs, key=(world().rank, 2)), steps=STEPS, output=folder / "own_keys", label="own keys")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
