"""Two processes that share each batch train what one process trains, whichever the recipe; a resume may change their number.
One launch by torchrun serves all of these tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainers import distributed_worker as worker
from tests.trainers.synthetic import SceneRows
from trainers import parallel
from trainers.conditioning import PromptEncoder
from trainers.model import load_vae

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in inputs.pt, and NAME_of_2/state.pt of each recipe, trained by two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    rows = SceneRows(8, load_vae(components), PromptEncoder.load(components, "post_norm"))
    torch.save(worker.Inputs(rows, components), folder / "inputs.pt")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DREAMLITE_PROGRESS": "0"}
    subprocess.run([*launch, "-m", "tests.trainers.distributed_worker", str(folder)], cwd=ROOT, env=environment, check=True, timeout=240)
    return folder


@pytest.fixture(scope="module")
def inputs(folder: Path) -> worker.Inputs:
    parallel.use_threads(1)
    return torch.load(folder / "inputs.pt", weights_only=False)


def weights(output: Path) -> dict[str, torch.Tensor]:
    state = torch.load(output / "state.pt", weights_only=True)
    return {f"{name}.{key}": value for name, module in state["modules"].items() for key, value in module.items()} | {
        f"ema.{key}": value for key, value in state["ema"].items()
    }


def furthest(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name].double() - right[name].double()).abs().max().item() for name in left)


@pytest.mark.parametrize("name", list(worker.RECIPES))
def test_two_processes_train_what_one_does(folder: Path, inputs: worker.Inputs, name: str) -> None:
    worker.train(name, inputs, folder / f"{name}_of_1")
    one, two = weights(folder / f"{name}_of_1"), weights(folder / f"{name}_of_2")
    print(name, furthest(one, two))
