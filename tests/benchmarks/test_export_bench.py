"""What the phone bundle costs: bytes and seconds of its variants, and how many exactly right images each keeps.
Takes the bundle in DREAMLITE_BENCH_BUNDLE, or the newest of ./lake: exactness needs a trained student."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trainers.export.evaluate import evaluate_bundle
from trainers.export.manifest import variant_bytes
from trainers.export.runner import Runner
from trainers.export.samples import Samples, load_samples
from trainers.export.settings import ExportSettings
from trainers.model import build_unet
from trainers.settings import ModelSettings

pytestmark = pytest.mark.benchmark

PROMPTS = 192


@pytest.fixture(scope="module")
def bundle() -> Path:
    given = os.environ.get("DREAMLITE_BENCH_BUNDLE")
    found = [Path(given)] if given else sorted(Path("lake/files/export").glob("*/bundle"), key=lambda path: path.stat().st_mtime)
    if not found:
        pytest.skip("no trained bundle: run `make retrain`, or set DREAMLITE_BENCH_BUNDLE")
    return found[-1]


@pytest.fixture(scope="module")
def samples(bundle: Path) -> Samples:
    return next(group for group in load_samples(bundle) if group.task == "generate")


def steps_of(runner: Runner, samples: Samples) -> Callable[[], float]:
    inputs = [samples.arrays[name][:1] for name in ("noise", "condition", "hidden_states", "mask")]

    def call() -> float:
        began = time.perf_counter()
        runner.denoise(*inputs)
        return time.perf_counter() - began

    return call


def median_ratio(first: Callable[[], float], second: Callable[[], float], pairs: int = 15) -> float:
    """Median of first / second over pairs taken in turn: a busy minute slows both sides."""
    first(), second()
    return statistics.median(first() / second() for _ in range(pairs))


def test_bytes_of_the_variants(bench, bundle: Path) -> None:
    manifest = Runner(bundle).manifest
    for variant, target in (("fp16", 0.55), ("int8", 0.30), ("int4", 0.25)):
        bench(f"export_{variant}_to_fp32_bytes", variant_bytes(manifest, variant) / variant_bytes(manifest, "fp32"), target)


def test_four_steps_against_torch_eager(bench, bundle: Path, samples: Samples) -> None:
    """One image; the small world's UNet, whose seconds do not depend on its weights."""
    torch.set_num_threads(1)
    runner = Runner(bundle)
    side, width = runner.latent_shape[1], runner.manifest["encoder"]["width"]
    unet = build_unet(ModelSettings(), width, side).eval()
    states = torch.from_numpy(samples.arrays["hidden_states"][:1])
    mask = torch.from_numpy(samples.arrays["mask"][:1])
    size = torch.full((1, 2), float(runner.manifest["shapes"]["image"]["width"]))

    @torch.no_grad()
    def eager() -> float:
        began = time.perf_counter()
        x, right = torch.from_numpy(samples.arrays["noise"][:1]), torch.zeros(1, *runner.latent_shape)
        for sigma, after in zip(runner.sigmas[:-1], runner.sigmas[1:], strict=True):
            velocity = unet(torch.cat([x, right], 3), torch.full((1,), 1000 * float(sigma)), states, encoder_attention_mask=mask,
                            added_cond_kwargs={"time_ids": size}, return_dict=False)[0]  # fmt: skip
            x = x + (after - sigma) * velocity[..., : x.shape[3]]
        return time.perf_counter() - began

    bench("runner_four_steps_to_torch_eager", median_ratio(steps_of(runner, samples), eager), 1.0)


def test_int8_against_fp32_seconds(bench, bundle: Path, samples: Samples) -> None:
    """Short where the CPU has no 8-bit dot product (VNNI, ARM's dotprod): x64quantprecision then widens to 16 bits."""
    ratio = median_ratio(steps_of(Runner(bundle, "int8"), samples), steps_of(Runner(bundle), samples))
    print(f"\ncpu flags {Runner(bundle).manifest['machine']['cpu_flags']}", end="")
    bench("runner_int8_to_fp32_seconds", ratio, 1.0)


@pytest.mark.parametrize("variant", ["fp16", "int8", "int4"])
def test_exact_matches_kept(bench, bundle: Path, variant: str) -> None:
    """Of the fp32 student's exactly right images, from the same questions and the same noise, in this run."""
    settings = ExportSettings(evaluate_rows=PROMPTS)
    exact = {}
    for name in ("fp32", variant):
        rows = evaluate_bundle(bundle, settings, name, seed=0).scores
        exact[name] = {row["task"]: row["value"] for row in rows if row["metric"] == f"{row['task']}_exact"}
    for task in ("generate", "edit"):
        if not exact["fp32"][task]:
            pytest.skip("the student gets nothing exactly right, so there is nothing to keep")
        bench(f"export_{variant}_exact_kept_{task}", exact[variant][task] / exact["fp32"][task], 0.98, higher_is_better=True)
        assert np.isfinite(exact[variant][task])
