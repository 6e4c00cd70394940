"""One of the processes of the tests of distribution: trains tiny recipes on the rows that the test made.
Started by torchrun, or by the test itself to be killed; imported by the test for its side of the comparison."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from dreamlite_data.rewards import RewardModel, load_reward
from tests.trainers.conftest import TINY_MODEL
from tests.trainers.synthetic import SceneRows
from trainers import parallel
from trainers.components.build import PACKAGED
from trainers.distributed import joined, world
from trainers.loop import Recipe, run
from trainers.lora import trainable
from trainers.model import build_unet, load_vae
from trainers.recipes import dmd2 as recipe_module
from trainers.recipes.dmd2 import DMD2Recipe
from trainers.recipes.refl import ReFLRecipe
from trainers.recipes.supervised import SupervisedRecipe
from trainers.reward_sharding import shard_reward
from trainers.settings import DMD2Settings, ReFLSettings, SupervisedSettings

STEPS = 4
JOINT = SupervisedSettings(
    tasks={"generate": 0.5, "edit": 0.5}, datasets=("t2i", "edit"), steps=STEPS, batch=8, micro_batch=2, warmup_steps=1
)
REFL = ReFLSettings(
    steps=STEPS, batch=4, micro_batch=1, rollout_steps=3, hinge="none", reward_weight=1.0, sigma_high=1.0, learning_rate=1e-3
)
DMD2 = DMD2Settings(steps=2, batch=4, micro_batch=4, student_steps=2, fake_steps=1, fake_warmup_steps=1)
"""A process holds all of its rows in one micro-batch: a normaliser that is a mean over them would depend on how many there are."""


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


def supervised(inputs: Inputs, key: tuple[int, ...] = (0, 2), **settings: object) -> SupervisedRecipe:
    return SupervisedRecipe(unet(), inputs.rows, JOINT.model_copy(update=settings), key)


def refl(inputs: Inputs) -> ReFLRecipe:
    rewards = {task: Warmth() for task in ("generate", "edit")}
    return ReFLRecipe(unet(), load_vae(inputs.components), rewards, inputs.rows, REFL, (0, 4))


def dmd2(inputs: Inputs, **settings: object) -> DMD2Recipe:
    return DMD2Recipe(unet(), inputs.rows, DMD2.model_copy(update=settings), (0, 5))


def with_sgd(recipe: Recipe) -> Recipe:
    """The recipe with plain SGD, which shows the rounding of sums as it is: nothing divides by a small moment."""
    for name, module in recipe.modules.items():
        recipe.optimizers[name] = torch.optim.SGD(trainable(module))  # the recipe sets the rate
    return recipe


def batch_mean_gradient(data: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The mistake: one normaliser for all rows at hand, so that the gradient of a row depends on how rows are shared out."""
    return (fake - real) / (data - real).abs().mean()


RECIPES: dict[str, Callable[[Inputs], Recipe]] = {
    "adamw": supervised,
    "sgd": lambda inputs: with_sgd(supervised(inputs, learning_rate=0.1)),
    "muon": lambda inputs: supervised(inputs, optimizer="muon"),
    "refl": refl,
    "dmd2": lambda inputs: with_sgd(dmd2(inputs, learning_rate=0.1, fake_learning_rate=0.1)),
}


def train(name: str, inputs: Inputs, output: Path, steps: int | None = None) -> Recipe:
    """Train a recipe in all processes there are; its state is in output/state.pt."""
    recipe = RECIPES[name](inputs)
    run(recipe, steps=steps or recipe.settings.steps, output=output, label=name)
    return recipe


def train_with_batch_mean(inputs: Inputs, output: Path) -> None:
    with mock.patch.object(recipe_module, "matching_gradient", batch_mean_gradient):
        train("dmd2", inputs, output)


def train_with_rewards(inputs: Inputs, output: Path, *, sharded: bool) -> ReFLRecipe:
    """A step of ReFL on each task with the rewards of the package, whole in each process or spread over all of them."""
    rewards = {task: load_reward(PACKAGED / "rewards" / task) for task in ("generate", "edit")}
    settings = REFL.model_copy(update={"steps": 2, "micro_batch": 2, "learning_rate": 0.1})
    if sharded:
        for reward in rewards.values():
            shard_reward(reward, settings.batch)
    recipe = with_sgd(ReFLRecipe(unet(), load_vae(inputs.components), rewards, inputs.rows, settings, (0, 4)))
    run(recipe, steps=2, output=output, label="refl")
    return recipe


def score_sharded(folder: Path, rank: int) -> None:
    """Scores and gradients to images of both rewards, before and after they are sharded, and how much of them is here."""
    found = {}
    for task in ("generate", "edit"):
        reward = load_reward(PACKAGED / "rewards" / task)
        images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(rank))
        sources = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(10 + rank)) if task == "edit" else None
        parameters = sum(parameter.numel() for parameter in reward.network.backbone.parameters())
        whole = scored(reward, images, sources)
        shard_reward(reward, 4)
        here = sum(parameter.to_local().numel() for parameter in reward.network.backbone.parameters())
        found[task] = {"whole": whole, "sharded": scored(reward, images, sources), "held": here / parameters}
    torch.save(found, folder / f"rewards_{rank}.pt")


def scored(reward: RewardModel, images: torch.Tensor, sources: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    images = images.clone().requires_grad_()
    scores = reward.differentiable(images, ["a red circle", "make the square blue"], sources)
    return scores.detach(), torch.autograd.grad(scores.sum(), images)[0]


def main(folder: Path) -> None:
    """Every recipe; half of one that the test goes on with alone; rewards that are sharded, scoring and training; and two mistakes that
    the test must notice: a key of each process's own, and a normaliser over the rows of a process."""
    inputs = torch.load(folder / "inputs.pt", weights_only=False)
    parallel.use_threads(1)
    with joined() as here:
        for name in RECIPES:
            train(name, inputs, folder / f"{name}_of_{here.size}")
        train("muon", inputs, folder / "elastic", steps=STEPS // 2)
        score_sharded(folder, here.rank)
        train_with_batch_mean(inputs, folder / "batch_mean_of_2")
        train_with_rewards(inputs, folder / "rewards_sharded", sharded=True)
        run(supervised(inputs, key=(world().rank, 2)), steps=STEPS, output=folder / "own_keys", label="own keys")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
