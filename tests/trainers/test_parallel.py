"""Threads change the time of a step and not one bit of it; micro-batches change it by rounding alone."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from tests.trainers.conftest import TINY_MODEL
from tests.trainers.synthetic import SceneRows
from trainers import parallel
from trainers.conditioning import PromptEncoder
from trainers.model import build_unet, load_vae
from trainers.recipes.supervised import SupervisedRecipe
from trainers.settings import SupervisedSettings

JOINT = SupervisedSettings(
    tasks={"generate": 0.5, "edit": 0.5}, datasets=("t2i", "edit"), steps=2, batch=8, micro_batch=4, warmup_steps=1, optimizer="muon"
)


@pytest.fixture(autouse=True)
def one_thread_afterwards():
    yield
    parallel.use_threads(1)


def gradients(rows: SceneRows, settings: SupervisedSettings) -> dict[str, torch.Tensor]:
    recipe = SupervisedRecipe(build_unet(TINY_MODEL, 64, 8), rows, settings, (0,))
    recipe.step(0)
    return {name: parameter.grad.clone() for name, parameter in recipe.unet.named_parameters() if parameter.grad is not None}


def test_threads_change_no_bit_and_micro_batches_only_the_last(components) -> None:
    rows = SceneRows(8, load_vae(components), PromptEncoder.load(components, "post_norm"))
    parallel.use_threads(1)
    one = gradients(rows, JOINT)
    parallel.use_threads(3)
    three = gradients(rows, JOINT)
    assert all(torch.equal(one[name], three[name]) for name in one)
    whole = gradients(rows, JOINT.model_copy(update={"micro_batch": 8}))
    scale = max(value.abs().max() for value in whole.values())
    assert max((one[name] - whole[name]).abs().max() for name in one) < 1e-5 * scale
    half = gradients(rows, JOINT.model_copy(update={"batch": 4}))
    assert max((half[name] - whole[name]).abs().max() for name in one) > 1e-2 * scale  # other rows, another gradient


def test_items_are_in_flight_together_in_order_and_keep_the_gradient_mode() -> None:
    assert parallel.use_threads(2) == 2
    meeting = threading.Barrier(2, timeout=20)

    def call(item: int) -> tuple[int, bool, int]:
        meeting.wait()  # passes only where two calls are under way at once
        return item, torch.is_grad_enabled(), torch.get_num_threads()

    with torch.no_grad():
        assert list(parallel.map_threads(call, range(4))) == [(item, False, 1) for item in range(4)]
    assert [graded for _, graded, _ in parallel.map_threads(call, range(2))] == [True, True]


def test_two_threads_take_pre_norm_states_from_one_encoder_without_mixing_them(components) -> None:
    encoder = PromptEncoder.load(components, "pre_norm")
    prompts = [["a small red circle at the left"], ["a large blue cross at the top right on a plain white background"]] * 6
    alone = [encoder.generate(copy.copy(each)).states for each in prompts]
    parallel.use_threads(2)
    together = [each.states for each in parallel.map_threads(encoder.generate, prompts)]
    assert all(torch.equal(left, right) for left, right in zip(alone, together, strict=True))
