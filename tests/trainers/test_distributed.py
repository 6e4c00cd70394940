"""Two processes that share each batch train what one process trains, whichever the recipe; a resume may change their number.
One launch by torchrun serves all of these tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainers import distributed_worker as worker
from tests.trainers.synthetic import SceneRows
from tests.trainers.toys import PointRows
from trainers import distributed, parallel, reward_sharding
from trainers.batch_plan import Plan
from trainers.conditioning import PromptEncoder
from trainers.model import load_vae
from trainers.reward_sharding import shard_reward

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in inputs.pt, and NAME_of_2/state.pt of each recipe, trained by two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    rows = SceneRows(8, load_vae(components), PromptEncoder.load(components, "post_norm"))
    torch.save(worker.Inputs(rows, components), folder / "inputs.pt")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DREAMLITE_PROGRESS": "0"}
    subprocess.run([*launch, "-m", "tests.trainers.distributed_worker", str(folder)], cwd=ROOT, env=environment, check=True, timeout=900)
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


ROUNDING = {"sgd": 1e-6, "muon": 1e-6, "refl": 1e-6, "dmd2": 1e-6, "adamw": 1e-5}
"""AdamW divides by the root of a second moment that is next to nothing for some parameters, and so enlarges the rounding of sums
that were taken in another order."""


@pytest.mark.parametrize("name", list(worker.RECIPES))
def test_two_processes_train_what_one_does(folder: Path, inputs: worker.Inputs, name: str) -> None:
    recipe = worker.train(name, inputs, folder / f"{name}_of_1")
    one, two = weights(folder / f"{name}_of_1"), weights(folder / f"{name}_of_2")
    assert furthest(one, two) <= ROUNDING[name]
    start = worker.unet().state_dict()
    trained = next(iter(recipe.modules.values())).state_dict()
    assert furthest(start, trained) > 1e-3, "it must have moved for the comparison to say anything"
    if name == "adamw":
        assert furthest(one, weights(folder / "own_keys")) > 1e-3, "a key for each process is another training"


def test_a_normaliser_over_the_rows_of_a_process_would_be_noticed(folder: Path, inputs: worker.Inputs) -> None:
    worker.train_with_batch_mean(inputs, folder / "batch_mean_of_1")
    assert furthest(weights(folder / "batch_mean_of_1"), weights(folder / "batch_mean_of_2")) > 100 * ROUNDING["dmd2"]


def test_reward_learning_takes_the_same_steps_with_sharded_rewards(folder: Path, inputs: worker.Inputs) -> None:
    recipe = worker.train_with_rewards(inputs, folder / "rewards_whole", sharded=False)
    assert furthest(weights(folder / "rewards_whole"), weights(folder / "rewards_sharded")) <= 1e-6
    assert furthest(worker.unet().state_dict(), recipe.unet.state_dict()) > 1e-3


def test_a_training_of_two_processes_goes_on_in_one(folder: Path, inputs: worker.Inputs) -> None:
    assert torch.load(folder / "elastic" / "state.pt", weights_only=True)["position"] == worker.STEPS // 2
    worker.train("muon", inputs, folder / "elastic")
    assert furthest(weights(folder / "elastic"), weights(folder / "muon_of_2")) <= ROUNDING["muon"]


def test_only_the_first_process_writes_and_once(folder: Path) -> None:
    lines = (folder / "adamw_of_2" / "metrics.jsonl").read_text().splitlines()
    names = [json.loads(line)["name"] for line in lines]
    assert len(names) == len(set(names)), "each value of the one logged position stands there once"
    assert not list(folder.glob("*/*.partial"))


def test_a_batch_that_leaves_a_process_without_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: distributed.World(0, 3))
    assert [distributed.own_share(rows) for rows in (3, 8, 9, 32)] == [1, 3, 3, 11]
    with pytest.raises(ValueError, match="4 rows leaves some of 3 processes"):
        distributed.own_share(4)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_shares_of_all_processes_are_the_batch_and_its_tasks_are_one_to_one(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    rows = PointRows(torch.zeros(1, 1), 1.0)
    batch = rows.batch(*Plan(rows.pools(), {"generate": 0.5, "edit": 0.5}, 8, (0,)).indices(3))
    shares = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "world", lambda rank=rank: distributed.World(rank, size))
        shares.append(batch.split(distributed.own_share(8))[rank])
    assert [position for share in shares for position in share.positions] == list(range(24, 32))
    assert torch.equal(torch.cat([share.latents for share in shares]), batch.latents)
    assert sum(int(share.is_edit.sum()) for share in shares) == 4


def test_sharded_rewards_score_as_whole_ones_and_lie_in_halves(folder: Path) -> None:
    for rank in range(2):
        for task, found in torch.load(folder / f"rewards_{rank}.pt", weights_only=True).items():
            (scores, gradients), (sharded_scores, sharded_gradients) = found["whole"], found["sharded"]
            assert (scores - sharded_scores).abs().max() < 1e-5, task
            assert gradients.abs().max() > 0
            assert (gradients - sharded_gradients).abs().max() < 1e-5 * gradients.abs().max(), task
            assert found["held"] == pytest.approx(0.5, abs=0.02), task
    with pytest.raises(ValueError, match="alone"):
        shard_reward(None, 4)


def test_rows_that_cannot_be_shared_evenly_are_refused_with_sharded_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_sharding, "world", lambda: distributed.World(0, 3))
    with pytest.raises(ValueError, match=r"make batch \(4\) a multiple of 3"):
        shard_reward(None, 4)
