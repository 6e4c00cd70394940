"""The loop's state on disk: a training killed at any step goes on where its last checkpoint stands and ends bit for bit alike.
What a checkpoint must hold is shown by leaving it out."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainers import killed_training
from tests.trainers.conftest import same
from tests.trainers.distributed_worker import Inputs
from tests.trainers.killed_training import KILLS, STEPS
from tests.trainers.synthetic import SceneRows
from tests.trainers.toy_recipe import BATCH, ToyRecipe, train
from trainers import parallel
from trainers.conditioning import PromptEncoder
from trainers.loop import run
from trainers.model import load_vae

ROOT = Path(__file__).resolve().parents[2]


def state(output: Path) -> dict:
    return torch.load(output / "state.pt", weights_only=True)


def logged(output: Path) -> list[tuple[float, str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["position"], line["name"], line["value"]) for line in lines if line["name"] == "loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(killed_training.RECIPES))
def test_killed_at_random_steps_it_ends_as_if_it_had_not_been(components: Path, tmp_path: Path, name: str) -> None:
    rows = SceneRows(8, load_vae(components), PromptEncoder.load(components, "post_norm"))
    torch.save(inputs := Inputs(rows, components), tmp_path / "inputs.pt")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DREAMLITE_PROGRESS": "0"}
    command = [sys.executable, "-m", "tests.trainers.killed_training", str(tmp_path), name, "7"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=900)
    parallel.use_threads(1)
    killed_training.train(name, inputs, tmp_path / "whole", tmp_path / "whole.jsonl")
    assert same(state(tmp_path / name), state(tmp_path / "whole")), "weights, optimizer, average, metrics or position differ"
    assert logged(tmp_path / name) == logged(tmp_path / "whole")

    lives, (whole,) = lives_in(tmp_path / f"{name}.jsonl"), lives_in(tmp_path / "whole.jsonl")
    assert len(lives) == KILLS + 1
    lost = []
    for life, following in itertools.pairwise(lives):
        resumed, reached, last = min(following.steps), max(life.steps), life.checkpoints[-1]
        assert last < STEPS, "the kill came in the middle"
        # A checkpoint may be written whose line is not: the kill fell between the two.
        assert last <= resumed <= reached + 1, "more was lost than what came after the last checkpoint"
        lost.append(reached + 1 - resumed)
    assert any(lost), "no kill ever cost a step: nothing was tried"
    done: dict[int, list[list[int]]] = {}
    for life in lives:  # what a life did after its last checkpoint is done again by the next: that one counts
        done |= life.steps
    assert done == whole.steps
    read = [tuple(each) for step in sorted(done) for each in done[step]]
    assert sorted(position for _, position in read) == list(range(len(read))), "no position of the plan is left out or repeated"
    counts = collections.Counter(row for row, _ in read)
    assert len(counts) == len(rows.rows) and len(set(counts.values())) == 1, "whole epochs: each row as often as any other"


@dataclasses.dataclass
class Life:
    """One process of a training: (row, position) of what each of its steps read, and the steps of its checkpoints."""

    steps: dict[int, list[list[int]]]
    checkpoints: list[int]


def lives_in(journal: Path) -> list[Life]:
    lives: dict[int, Life] = {}
    for event in map(json.loads, journal.read_text().splitlines()):
        life = lives.setdefault(event["process"], Life({}, []))
        if "step" in event:
            life.steps[event["step"]] = []
        elif "checkpoint" in event:
            life.checkpoints.append(event["checkpoint"])
        elif life.steps:  # what a recipe reads before its first step is no training
            life.steps[max(life.steps)] += event["rows"]
    return list(lives.values())


@pytest.mark.parametrize("lost", ["nothing", "ema", "position", "optimizers"])
def test_a_resumed_training_is_bit_equal_only_with_all_of_its_state(tmp_path: Path, lost: str) -> None:
    train(tmp_path / "whole", steps=12)
    train(tmp_path / "parts", steps=6)
    if lost != "nothing":
        begun, fresh = state(tmp_path / "parts"), ToyRecipe()
        start = {"ema": fresh.ema.weights, "position": 0, "optimizers": {"net": fresh.optimizers["net"].state_dict()}}
        torch.save(begun | {lost: start[lost]}, tmp_path / "parts" / "state.pt")
    train(tmp_path / "parts", steps=12)
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert same(whole["modules"], parts["modules"]) == (lost in ("nothing", "ema"))
    assert same(whole["ema"], parts["ema"]) == (lost == "nothing")


def test_a_finished_training_does_no_step_and_gives_the_same_metrics(tmp_path: Path) -> None:
    first = run(ToyRecipe(), steps=30, output=tmp_path, label="toy")
    again = ToyRecipe()
    again.step = lambda index: pytest.fail(f"step {index} was done again")
    assert run(again, steps=30, output=tmp_path, label="toy")["loss"] == first["loss"]


def test_the_log_says_how_fast_it_went_and_how_long_it_waited(tmp_path: Path) -> None:
    means = run(ToyRecipe(pause_s=0.002), steps=20, output=tmp_path, label="toy", flops_per_sample=lambda index: 1e9 if index < 10 else 3e9)
    assert means["samples_per_s"] < BATCH / 0.002
    assert means["tflops_per_s"] == pytest.approx(means["samples_per_s"] * 2e-3)
    assert means["data_wait_share"] == 0.0, "the toy draws its rows itself"
    names = {json.loads(line)["name"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()}
    assert {"loss", "samples_per_s", "data_wait_share", "tflops_per_s"} <= names


def test_two_trainings_do_not_write_to_one_folder(tmp_path: Path) -> None:
    other = ToyRecipe()
    refusals = []

    def meanwhile(position: int, _: object) -> None:
        if position == 4:  # the training is over, and told of a last time
            return
        with pytest.raises(RuntimeError, match="another process is training in") as refused:
            run(other, steps=4, output=tmp_path, label="second")
        refusals.append(refused)

    run(ToyRecipe(pause_s=0.05), steps=4, output=tmp_path, label="first", checkpoint_every_s=0.0, on_checkpoint=meanwhile)
    assert refusals and other.ema.updates == 0
    run(other, steps=4, output=tmp_path, label="later")  # the first has ended


def test_the_last_tenth_is_of_steps_also_for_what_is_logged_now_and_then(tmp_path: Path) -> None:
    class Counting(ToyRecipe):
        def step(self, index: int) -> dict[str, float]:
            super().step(index)
            rare = {"rare": float(index)} if index % 40 == 0 else {}
            return {"each": float(index)} | ({"second": float(index)} if index % 2 == 0 else {}) | rare

    metrics = run(Counting(), steps=100, output=tmp_path, label="toy")
    assert (metrics["each"], metrics["second"], metrics["rare"]) == (94.5, 94.0, 80.0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["position"] for line in lines if line["name"] == "rare"] == [10, 50, 90], "once each, where it was found"
