"""The path of ReFL's gradient through the decoder and the rewards of the package: it is the slope of the reward along one step of the
rollout, the frozen parts stay as they are, and the steps before it leave no graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dreamlite_data.rewards import load_reward
from tests.trainers.conftest import TINY_MODEL, same
from tests.trainers.synthetic import SceneRows
from trainers.components.build import PACKAGED
from trainers.conditioning import PromptEncoder
from trainers.flow import data_from_velocity
from trainers.model import build_unet, load_vae
from trainers.recipes.refl import ReFLRecipe
from trainers.settings import ReFLSettings

TASKS = ("generate", "edit")
SETTINGS = ReFLSettings(
    steps=2, batch=2, micro_batch=2, rollout_steps=4, sigma_high=1.0, hinge="none", reward_weight=1.0, velocity_weight=0.0, clip_norm=1e9,
    learning_rate=1e-9, guidance_scale=2.0,
)  # fmt: skip
DISTANCE = {"generate": 1e-3, "edit": 2e-4}
"""Far enough to stand out of float32's rounding, near enough that the reward is straight; that of edits is fifty times as steep."""


@pytest.fixture(scope="module")
def recipe(components: Path) -> ReFLRecipe:
    torch.set_num_threads(1)
    vae = load_vae(components)
    rows = SceneRows(4, vae, PromptEncoder.load(components, "post_norm"))
    rewards = {task: load_reward(PACKAGED / "rewards" / task) for task in TASKS}
    return ReFLRecipe(build_unet(TINY_MODEL, 64, 8), vae, rewards, rows, SETTINGS, (0, 4))


@pytest.mark.parametrize("task", TASKS)
def test_the_gradient_is_the_slope_through_decoder_and_reward(recipe: ReFLRecipe, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along a direction of which half is the gradient and half is random: within 1 % of a difference of both sides."""
    frozen = {"decoder": recipe.vae, "reference": recipe.reference, **{name: reward.network for name, reward in recipe.rewards.items()}}
    before = {name: {key: value.clone() for key, value in module.state_dict().items()} for name, module in frozen.items()}
    batch, stop, index = recipe._batch(task, TASKS.index(task)), 2, TASKS.index(task)
    monkeypatch.setattr(recipe, "_exits", lambda batch: [stop])
    recipe.step(index)
    assert all(same(before[name], dict(module.state_dict())) for name, module in frozen.items())
    assert all(parameter.grad is None for module in frozen.values() for parameter in module.parameters())

    parameters = list(recipe.unet.parameters())
    gradient = [parameter.grad.clone() for parameter in parameters]
    random = [torch.randn(value.shape, generator=torch.Generator().manual_seed(3)) for value in gradient]
    direction = [a / norm(gradient) + b / norm(random) for a, b in zip(gradient, random, strict=True)]
    slope = sum((a * b).sum().item() for a, b in zip(gradient, direction, strict=True))
    held, t = recipe._rollout(recipe.unet, batch, stop), torch.full((2,), recipe._sigmas(batch)[stop])

    @torch.no_grad()
    def loss_at(distance: float) -> float:
        for parameter, along in zip(parameters, direction, strict=True):
            parameter.add_(distance * along)
        data = data_from_velocity(held, recipe._predict(recipe.unet, held, t, batch), t)
        for parameter, along in zip(parameters, direction, strict=True):
            parameter.sub_(distance * along)
        return -recipe._reward(task, batch, data).mean().item() / recipe.baseline[task][1]

    difference = (loss_at(DISTANCE[task]) - loss_at(-DISTANCE[task])) / (2 * DISTANCE[task])
    assert abs(slope) > 0.01
    assert slope == pytest.approx(difference, rel=0.01)


def norm(values: list[torch.Tensor]) -> float:
    return sum((value**2).sum().item() for value in values) ** 0.5


def test_the_steps_before_it_leave_no_graph(recipe: ReFLRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for the backward pass is as much after three steps as after none, and not where the rollout keeps its own."""
    batch = recipe._batch("edit", 1)

    def kept_bytes(stop: int) -> int:
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            held = recipe._estimate(recipe.unet, batch, stop)  # alive, so that no address is used twice
        assert held[-1].requires_grad
        return sum(kept.values())

    assert kept_bytes(3) == pytest.approx(kept_bytes(0), rel=0.01)
    monkeypatch.setattr(ReFLRecipe, "_rollout", ReFLRecipe._rollout.__wrapped__)
    assert kept_bytes(3) > 4 * kept_bytes(0), "two guided branches a step"
