"""A stage trained where the execution settings say, from a real lake: in this process, by two of torchrun, and by two workers of Ray Train.
The weights differ by the rounding of a sum, and what cannot run is refused before anything starts."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file

from dreamlite_data.lake import Lake
from tests.trainers.synthetic import caption_lake
from trainers import ray_train, stages
from trainers.batch_plan import Plan
from trainers.data import read_rows
from trainers.execution import TrainExecution
from trainers.launch import StageRequest, cause_in, train
from trainers.model import load_unet
from trainers.ray_train import refuse_too_small
from trainers.settings import ModelSettings, ReFLSettings, SizePhase, SupervisedSettings

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
def test_a_row_that_is_not_finite_in_one_process_ends_all_and_is_named(components: Path, tmp_path: Path) -> None:
    """The latent of one image is NaN in the cache: the process that meets it says so, the other one's wait for it is no cause."""
    caption_lake(tmp_path / "lake")
    with Lake(tmp_path / "lake", read_only=True) as lake:
        train(request(tmp_path / "lake", components, tmp_path / "alone"), lake)
        (part,) = (tmp_path / "lake/files/cache").glob("latents-*/part-*.safetensors")
        with safe_open(part, framework="pt") as file:
            metadata, flat, lengths = file.metadata(), file.get_tensor("flat"), file.get_tensor("lengths")
        order = Plan({(64, 64): {"generate": list(range(12))}}, T2I.tasks, T2I.batch, (3, 0)).indices(0)[0]
        bad = read_rows(lake, [("t2i", 1)], split="train")[order[-1]]  # the last row of the first batch is the second process's
        flat.split(lengths.tolist())[json.loads(metadata["keys"]).index(bad.image_id)].fill_(torch.nan)
        save_file({"flat": flat, "lengths": lengths}, part, metadata)
        with pytest.raises(RuntimeError, match="failed under torchrun: .*FloatingPointError: t2i: the loss of 2 rows is not finite at step 0") as told:
            train(request(tmp_path / "lake", components, tmp_path / "out", runner="torchrun", workers=2, max_failures=2), lake)
    trained = (tmp_path / "out/torchrun.log").read_text().count("in train_stage")
    assert 1 <= trained <= 2, "restarted processes do not retry what will fail again"
    assert [path.name for path in (tmp_path / "out").glob("offending_rows*.json")] == ["offending_rows.1.json"]
    kept = json.loads((tmp_path / "out/offending_rows.1.json").read_text())["rows"]
    assert bad.row_id in [row["row_id"] for row in kept] and all(row["row_id"] in str(told.value) for row in kept)
    assert not (tmp_path / "out/checkpoint").exists()


def kill_a_worker(output: Path, runner: str, killed: list[int]) -> threading.Thread:
    """Waits for the first checkpoint in `output` and then ends a worker, the one that writes under torchrun, as a lost node would."""

    def watch() -> None:
        ends = time.monotonic() + 200
        while not (output / "state.pt").exists():
            if time.monotonic() > ends:
                return
            time.sleep(0.005)
        worker = min(workers_of(runner), key=lambda process: process.pid)
        killed.append(worker.pid)
        worker.kill()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def workers_of(runner: str) -> list[psutil.Process]:
    """Processes below this one that train."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:  # it ended meanwhile
            continue
        sign = "RayTrainWorker" if runner == "ray" else "-m trainers.launch"
        if sign in command and "torch.distributed.run" not in command:
            found.append(process)
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("runner", ["torchrun", "ray"])
def test_a_lost_worker_is_replaced_and_the_weights_are_those_of_a_run_without_loss(
    root: Path, components: Path, tmp_path: Path, runner: str
) -> None:
    longer = T2I.model_copy(update={"steps": 24})
    options = {"workers": 2, "checkpoint_every_s": 0.0} | ({"cpus_per_worker": 0.5} if runner == "ray" else {})

    def asked(name: str, **execution: object) -> StageRequest:
        return request(root, components, tmp_path / name, **execution).model_copy(update={"settings": longer})

    with Lake(root, read_only=True) as lake:
        alone, killed, started = train(asked("alone"), lake), [], time.monotonic()
        watching = kill_a_worker(tmp_path / "replaced", runner, killed)
        answer = train(asked("replaced", runner=runner, max_failures=1, **options), lake)
        watching.join(10)
        assert killed and answer["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert furthest(tmp_path / "alone", tmp_path / "replaced") < 1e-6
        assert time.monotonic() - started < 240
        lines = [json.loads(line) for line in (tmp_path / "replaced/metrics.jsonl").read_text().splitlines()]
        logged = [(line["position"], line["name"]) for line in lines if line["name"] == "loss"]
        assert logged == [(10, "loss"), (20, "loss"), (24, "loss")], "each step counts once"
        # The control: without a replacement the loss is an error, and what was reached stays.
        kill_a_worker(tmp_path / "lost", runner, killed)
        with pytest.raises(RuntimeError, match="stage 't2i' failed"):
            train(asked("lost", runner=runner, max_failures=0, **options), lake)
        assert len(killed) == 2 and torch.load(tmp_path / "lost/state.pt", weights_only=True)["position"] < 24
    assert not workers_of(runner), "they have ended with the stage"


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


def test_a_stage_goes_on_only_from_a_checkpoint_of_the_same_rows_and_parts(root: Path, components: Path, tmp_path: Path) -> None:
    """Another number of a dataset version with the same rows is the same training; each other change is refused by its name."""
    brief = T2I.model_copy(update={"steps": 2})
    asked = request(root, components, tmp_path / "out").model_copy(update={"settings": brief})
    with Lake(root) as lake:
        parent = tmp_path / "out" / "checkpoint"
        train(asked, lake)
        rows = lake.query("SELECT * FROM dataset_rows WHERE name = 't2i' AND version = 1").to_pylist()
        for version, digest in ((3, "d"), (4, "e")):
            numbered = [row | {"version": version} for row in rows]
            lake.append({"datasets": [{"name": "t2i", "version": version, "digest": digest, "rows": 12}], "dataset_rows": numbered})
        train(asked.model_copy(update={"datasets": {"t2i": 3}}), lake)
        other = shutil.copytree(components, tmp_path / "components")
        (other / "vae" / "note.txt").write_text("another version of the part")
        changes = {"rows": {"datasets": {"t2i": 4}}, "components": {"components": other}, "parent": {"parent": parent}}
        for name, change in changes.items():
            with pytest.raises(ValueError, match=rf"state.pt began as another training \({name}: "):
                train(asked.model_copy(update=change), lake)


def test_a_request_survives_the_way_to_another_process(root: Path, components: Path, tmp_path: Path) -> None:
    sent = request(root, components, tmp_path, runner="ray", workers=(1, 4))
    assert StageRequest.model_validate_json(sent.model_dump_json()) == sent


def test_workers_get_the_second_scorer_s_folder_from_wherever_they_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[StageRequest] = []

    def launched(request: StageRequest) -> None:
        sent.append(request)
        (request.output / "trained.json").write_text("{}")

    monkeypatch.setattr(ray_train, "train_on_ray", launched)
    monkeypatch.chdir(tmp_path)
    settings = ReFLSettings(steps=1, second_scorers={"generate": {"kind": "clip", "model": "weights/clip"}})
    asked = request(root, Path("parts"), Path("out"), runner="ray", workers=2).model_copy(update={"stage": "refl", "settings": settings})
    with Lake(root) as lake:
        train(asked, lake)
    assert sent[0].settings.second_scorers["generate"].model == tmp_path / "weights" / "clip"
    assert sent[0].components == tmp_path / "parts"


def test_the_first_failure_is_told_and_not_what_it_did_to_the_others() -> None:
    log = """
[rank0]: FloatingPointError: refl: the gradient of 1 rows is not finite at step 7 (row_a)
[rank1]: RuntimeError: [../gloo/transport/tcp/pair.cc] Connection closed by peer
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
"""
    assert "row_a" in cause_in(log)
    assert "closed by peer" in cause_in("RuntimeError: Connection closed by peer") and cause_in("\n") == "it said nothing"


def test_a_stage_that_stopped_itself_makes_no_checkpoint(
    root: Path, components: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "run", lambda recipe, **_: {"loss": 1.0, "stopped_at_step": 3.0})
    monkeypatch.setattr(stages.SupervisedRecipe, "stop_reason", lambda recipe: "the reward is being hacked", raising=False)
    with Lake(root) as lake, pytest.raises(RuntimeError, match="stopped after 3 of 6 steps.*no checkpoint.*being hacked"):
        train(request(root, components, tmp_path), lake)
    assert not (tmp_path / "checkpoint").exists()
    monkeypatch.setattr(stages, "run", lambda recipe, **_: {"loss": 1.0})
    with Lake(root) as lake:
        train(request(root, components, tmp_path), lake)
    assert (tmp_path / "checkpoint").exists()


def test_a_curriculum_that_ends_at_another_size_than_the_checkpoint_is_refused(root: Path, components: Path, tmp_path: Path) -> None:
    phases = T2I.model_copy(update={"size_phases": (SizePhase(size_px=32, steps=6),)})
    asked = request(root, components, tmp_path).model_copy(update={"settings": phases})
    with Lake(root) as lake, pytest.raises(ValueError, match="ends at 32 px.*64 px: end with that size"):
        train(asked, lake)


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
