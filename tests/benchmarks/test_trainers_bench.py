"""What a training step costs, against the bare network, against torch's own threads, and against the loop of diffusers' example.
All ratios of two things measured in turn in one run."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests.benchmarks import training_loops
from tests.trainers.synthetic import SceneRows
from trainers import parallel
from trainers.components.build import PACKAGED
from trainers.conditioning import PromptEncoder
from trainers.flow import deployed_sigmas, guided_velocity, keyed_normal, predict, sample
from trainers.loop import run
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


def timed(step: Callable[[], object]) -> Callable[[], float]:
    def call() -> float:
        started = time.perf_counter()
        step()
        return time.perf_counter() - started

    return call


def bare_step(rows: SceneRows, settings: SupervisedSettings) -> Callable[[], float]:
    """The least that trains this network on a batch in plain PyTorch: the batch is there already, nothing is averaged or logged."""
    unet = build_unet(ModelSettings(), 128, rows.side).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=settings.learning_rate)
    half = settings.batch // 2
    batch = rows.batch(rows.by_task["generate"][:half] + rows.by_task["edit"][:half], range(settings.batch))
    noise, t = torch.randn_like(batch.latents), torch.rand(settings.batch)
    x = (1 - t.view(-1, 1, 1, 1)) * batch.latents + t.view(-1, 1, 1, 1) * noise

    def step() -> None:
        loss = F.mse_loss(predict(unet, x, t, batch.condition, batch.text, rows.size_px), noise - batch.latents)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), settings.clip_norm)
        optimizer.step()

    return timed(step)


def test_loop_against_a_bare_step(bench, rows) -> None:
    """On one thread and in one micro-batch, so that only what the loop adds is compared: rows, drop-out, average, logs."""
    parallel.use_threads(1)
    settings = JOINT.model_copy(update={"optimizer": "adamw", "micro_batch": JOINT.batch})
    bench("step_time_to_bare_pytorch", median_ratio(stepper(rows, settings), bare_step(rows, settings)), 1.03)


def test_data_wait_with_warm_caches(bench, rows, tmp_path) -> None:
    parallel.use_threads(2)
    settings = JOINT.model_copy(update={"steps": 12})
    recipe = SupervisedRecipe(build_unet(ModelSettings(), 128, rows.side), rows, settings, (0,))
    bench("data_wait_share", run(recipe, steps=12, output=tmp_path, label="wait")["data_wait_share"], 0.02)


def test_sampler_against_the_network_alone(bench, rows) -> None:
    """A guided rollout of a batch over as many bare calls of the UNet as it needs."""
    parallel.use_threads(1)
    unet = build_unet(ModelSettings(), 128, rows.side).eval()
    batch = rows.batch(rows.by_task["generate"][:16], range(16), with_target=False)
    sigmas, noise = deployed_sigmas(4, rows.side, rows.side), keyed_normal((0,), range(16), tuple(batch.condition.shape[1:]))
    velocity = guided_velocity(unet, batch.condition, batch.text, batch.null, batch.is_edit, rows.size_px, 2.0, 1.0)
    t = torch.full((16,), 0.5)

    @torch.no_grad()
    def sampled() -> None:
        sample(velocity, noise, sigmas)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(len(sigmas) - 1):
            for text in (batch.text, batch.null):
                predict(unet, noise, t, batch.condition, text, rows.size_px)

    bench("sampler_rate_to_unet_alone", median_ratio(timed(bare), timed(sampled)), 0.97, higher_is_better=True)


def test_loop_against_the_example_of_diffusers(bench) -> None:
    """The same model, batch and rows on the cores there are; each side with its own way to use them."""
    ours, theirs = timed(training_loops.ours()), timed(training_loops.of_diffusers())

    def with_ours() -> float:
        parallel.use_threads(2)
        return ours()

    def with_theirs() -> float:
        parallel.use_threads(1)
        torch.set_num_threads(2)
        return theirs()

    bench("step_time_to_diffusers_example", median_ratio(with_ours, with_theirs), 1.0)


def test_memory_against_the_example_of_diffusers(bench) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "DREAMLITE_PROGRESS": "0"}
    peaks = {}
    for name in ("ours", "diffusers"):
        command = [sys.executable, "-m", "tests.benchmarks.training_loops", name]
        answer = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True)
        peaks[name] = int(answer.stdout.split()[-1])
    bench("peak_memory_per_sample_to_diffusers_example", peaks["ours"] / peaks["diffusers"], 1.0)
