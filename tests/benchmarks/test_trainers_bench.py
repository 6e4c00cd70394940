"""What a training step costs: two threads of ours against torch's own two, and Muon against AdamW."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

from tests.trainers.synthetic import SceneRows
from trainers import parallel
from trainers.components.build import PACKAGED
from trainers.conditioning import PromptEncoder
from trainers.model import build_unet, load_vae
from trainers.recipes.supervised import SupervisedRecipe
from trainers.settings import ModelSettings, SupervisedSettings

pytestmark = pytest.mark.benchmark

JOINT = SupervisedSettings(
    tasks={"generate": 0.5, "edit": 0.5}, datasets=("t2i", "edit"), steps=100, batch=32, micro_batch=16, optimizer="muon"
)


@pytest.fixture(scope="module")
def rows() -> SceneRows:
    return SceneRows(24, load_vae(PACKAGED), PromptEncoder.load(PACKAGED, "post_norm"))


@pytest.fixture(autouse=True)
def one_thread_afterwards():
    yield
    parallel.use_threads(1)


def stepper(rows: SceneRows, settings: SupervisedSettings) -> Callable[[], float]:
    recipe = SupervisedRecipe(build_unet(ModelSettings(), 128, rows.side), rows, settings, (0,))
    numbers = iter(range(1_000))

    def step() -> float:
        started = time.perf_counter()
        recipe.step(next(numbers))
        return time.perf_counter() - started

    return step


def median_ratio(first: Callable[[], float], second: Callable[[], float], pairs: int = 7) -> float:
    """Median of first / second over pairs taken in turn: a busy minute slows both sides."""
    first(), second()
    return statistics.median(first() / second() for _ in range(pairs))


def test_two_threads_against_the_two_of_torch(bench, rows) -> None:
    ours, theirs = stepper(rows, JOINT), stepper(rows, JOINT.model_copy(update={"micro_batch": 32}))

    def with_ours() -> float:
        parallel.use_threads(2)
        return ours()

    def with_torch() -> float:
        parallel.use_threads(1)
        torch.set_num_threads(2)
        return theirs()

    bench("step_time_to_torch_threads", median_ratio(with_ours, with_torch), 0.9)


def test_muon_against_adamw(bench, rows) -> None:
    parallel.use_threads(2)
    muon, adamw = stepper(rows, JOINT), stepper(rows, JOINT.model_copy(update={"optimizer": "adamw"}))
    bench("step_time_muon_to_adamw", median_ratio(muon, adamw), 1.35)
