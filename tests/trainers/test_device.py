"""Which device a process computes on; and that nothing of a step, a drawing or a checkpoint is left on the CPU.
There is no GPU to prove the second on: one program computes everything on the CPU and on a pretended device that refuses to mix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from flows.config import ExecSettings
from tests.trainers.synthetic import caption_lake
from trainers import launch, parallel, stages
from trainers.device import use_device
from trainers.distributed import backend
from trainers.execution import TrainExecution
from trainers.settings import ModelSettings, ReFLSettings, SupervisedSettings

ROOT = Path(__file__).resolve().parents[2]
CASES = ("two_branches", "three_branches", "evaluation", "stage", "adamw", "muon", "adapter", "refl", "dmd2")


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A torch that sees four GPUs; returns those that are made the current one."""
    current: list[torch.device] = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    return current


def test_a_process_takes_the_gpu_of_its_local_rank(four_gpus, monkeypatch) -> None:
    assert use_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert use_device("cuda") == torch.device("cuda", 2)
    assert four_gpus == [torch.device("cuda", 0), torch.device("cuda", 2)], "NCCL and FSDP2 take the current one"
    assert not torch.backends.cudnn.allow_tf32
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(RuntimeError, match="process 5 of this machine finds no GPU of its own, torch sees 4: lower exec.train.workers to 4"):
        use_device()
    assert use_device("cpu") == torch.device("cpu"), "more processes than GPUs are well on the CPU"


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert use_device() == use_device("cpu") == torch.device("cpu")
    with pytest.raises(RuntimeError, match="exec.device is cuda, but torch sees no GPU here"):
        use_device("cuda")


def test_on_ray_the_gpu_that_is_set_aside_decides(tmp_path) -> None:
    def wanted(device: str, **execution: Any) -> str:
        settings = SupervisedSettings(tasks={"generate": 1.0}, datasets=("t2i",), steps=1)
        request = launch.StageRequest(
            stage="t2i", settings=settings, model=ModelSettings(), components=tmp_path, parent=None, lake=tmp_path, datasets={}, output=tmp_path,
            seed=0, execution=TrainExecution(**execution), device=device,
        )  # fmt: skip
        return launch._wanted(request)

    assert wanted("auto", runner="ray", gpus_per_worker=1) == "cuda"
    assert wanted("auto", runner="ray") == "cpu", "a worker without a GPU may see those of others"
    assert [wanted(device, runner="torchrun", workers=2) for device in ("auto", "cpu", "cuda")] == ["auto", "cpu", "cuda"]
    with pytest.raises(ValidationError, match="exec.device is cuda, but Ray sets no GPU aside"):
        ExecSettings(device="cuda", train={"runner": "ray"})
    with pytest.raises(ValidationError, match="sets a GPU aside for each worker: set it to 0"):
        ExecSettings(device="cpu", train={"runner": "ray", "gpus_per_worker": 1})
    with pytest.raises(ValidationError, match="'auto', 'cpu' or 'cuda'"):
        ExecSettings(device="gpu")


def test_a_gpu_is_driven_by_one_thread_and_summed_over_by_nccl() -> None:
    assert parallel.use_threads(3) == 3 and parallel._pool is not None
    assert parallel.use_threads(3, torch.device("cuda", 0)) == 1 and parallel._pool is None
    assert backend("cuda") == "cpu:gloo,cuda:nccl" and backend("cpu") == "gloo"


def test_reward_models_are_loaded_in_the_precision_of_the_recipe(checkpoints, tmp_path, monkeypatch) -> None:
    class Loaded(Exception):
        pass

    def load_reward(folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        raise Loaded(dtype)

    monkeypatch.setattr(stages, "load_reward", load_reward)
    monkeypatch.setattr(stages, "TrainingRows", lambda *_, **__: None)
    for precision in ("float32", "bfloat16"):
        with pytest.raises(Loaded, match=f"torch.{precision}"):
            stages.train_stage(
                "refl", ReFLSettings(steps=1, precision=precision), ModelSettings(), components=checkpoints["base"], parent=checkpoints["base"],
                lake=None, datasets={"rl": 1}, output=tmp_path, seed=0,
            )  # fmt: skip


@pytest.fixture(scope="module")
def found(components: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program found, by case."""
    folder = tmp_path_factory.mktemp("devices")
    caption_lake(folder / "lake")
    command = [sys.executable, "-m", "tests.trainers.device_worker", str(components), str(folder / "lake"), str(folder), *CASES]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DREAMLITE_PROGRESS": "0"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=1800)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES)
def test_a_device_computes_what_the_cpu_does(found: dict[str, Any], case: str) -> None:
    """To the last bit: the pretended device computes with the CPU's kernels."""
    result = found[case]
    assert "error" not in result, result["error"]
    assert result["alike"] and result["largest"] == 0.0, result


@pytest.mark.thorough
def test_a_step_waits_for_the_device_twice_however_many_micro_batches(found: dict[str, Any]) -> None:
    assert len(found["reads"]["1"]) == len(found["reads"]["4"]) == 2, "the logs of all micro-batches, and the gradient's norm"


@pytest.mark.thorough
def test_a_tensor_left_on_the_cpu_is_found_with_its_operation(found: dict[str, Any]) -> None:
    said = found["noise_left_behind"]
    assert "aten.mul.Tensor: a tensor [2, 4, 8, 8] on the CPU meets one on pretended:0" in said
    assert "in interpolate" in said
