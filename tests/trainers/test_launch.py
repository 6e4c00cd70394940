"""A stage trained where the execution settings say, from a real lake: in this process, by two of torchrun, and by two workers of Ray Train.
The weights differ by the rounding of a sum, and what cannot run is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from dreamlite_data.lake import Lake
from tests.trainers.synthetic import caption_lake
from trainers.execution import TrainExecution
from trainers.launch import StageRequest, train
from trainers.model import load_unet
from trainers.ray_train import refuse_too_small
from trainers.settings import ModelSettings, SupervisedSettings

T2I = SupervisedSettings(tasks={"generate": 1.0}, datasets=("t2i",), steps=6, batch=8, micro_batch=2, warmup_steps=1, optimizer="muon")
MODEL = ModelSettings(channels=(32, 64), head_width=16, attention_at_full_resolution=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("launch") / "lake"
    caption_lake(root)
    return root


def request(root: Path, components: Path, output: Path, **execution: object) -> StageRequest:
    return StageRequest(
        stage="t2i", settings=T2I, model=MODEL, components=components, parent=None, lake=root, datasets={"t2i": 1}, output=output, seed=3,
        threads=1, execution=TrainExecution(**execution),
    )  # fmt: skip


def furthest(left: Path, right: Path) -> float:
    one, two = (load_unet(output / "checkpoint").state_dict() for output in (left, right))
    return max((one[name] - two[name]).abs().max().item() for name in one)


@pytest.mark.thorough
def test_two_processes_of_torchrun_train_what_this_one_does_and_name_what_failed(root: Path, components: Path, tmp_path: Path) -> None:
    execution = {"runner": "torchrun", "workers": 2, "max_failures": 0}
    together = request(root, components, tmp_path / "together", **execution)
    with Lake(root, read_only=True) as lake:
        alone = train(request(root, components, tmp_path / "alone"), lake)
        answer = train(together, lake)
        assert answer["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert 0 < furthest(tmp_path / "alone", tmp_path / "together") < 1e-6, "equal to the bit would mean that nothing was shared"
        broken = request(root, components, tmp_path / "broken", **execution).model_copy(update={"datasets": {"t2i": 2}})
        with pytest.raises(RuntimeError, match="stage 't2i' failed under torchrun: .*t2i.*torchrun.log"):
            train(broken, lake)


@pytest.mark.thorough
def test_two_workers_of_ray_train_what_this_process_does_and_go_on_from_its_checkpoint(root: Path, components: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with Lake(root, read_only=True) as lake:
        alone = train(request(root, components, tmp_path / "alone"), lake)
        together = request(
            root, components, tmp_path / "together", runner="ray", workers=2, cpus_per_worker=0.5, checkpoint_every_s=0.0, max_failures=0
        )
        answer = train(together, lake)
        assert answer["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert furthest(tmp_path / "alone", tmp_path / "together") < 1e-6
        # The same folder again: every worker resumes at the end of the training, and no step is done.
        assert train(together, lake)["loss"] == answer["loss"]
    assert torch.load(tmp_path / "together/state.pt", weights_only=True)["position"] == T2I.steps
    reported = sorted((tmp_path / "together/ray").glob("*/checkpoint_*/state.json"))
    assert len(reported) == 2, "the newest checkpoint of each of the two runs"
    assert all(json.loads(path.read_text())["position"] == T2I.steps for path in reported)


def test_a_request_survives_the_way_to_another_process(root: Path, components: Path, tmp_path: Path) -> None:
    sent = request(root, components, tmp_path, runner="ray", workers=(1, 4))
    assert StageRequest.model_validate_json(sent.model_dump_json()) == sent


def test_settings_that_cannot_run_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"workers \[1, 4\] needs runner: ray"):
        TrainExecution(runner="torchrun", workers=(1, 4))
    with pytest.raises(ValidationError, match="plain is one process"):
        TrainExecution(workers=2)
    with pytest.raises(ValidationError, match="two or more workers"):
        TrainExecution(shard_rewards=True)
    with pytest.raises(ValidationError, match="did you mean 'workers'"):
        TrainExecution(worker=2)


def test_too_small_a_cluster_is_refused_instead_of_waited_for() -> None:
    node = {"Alive": True, "Resources": {"CPU": 2.0}}
    refuse_too_small([node, node], TrainExecution(runner="ray", workers=4))
    refuse_too_small([node], TrainExecution(runner="ray", workers=(1, 4)))  # it starts with two
    with pytest.raises(RuntimeError, match="room for 2 workers"):
        refuse_too_small([node], TrainExecution(runner="ray", workers=4))
    with pytest.raises(RuntimeError, match="room for 0 workers"):
        refuse_too_small([node], TrainExecution(runner="ray", workers=1, gpus_per_worker=1))
