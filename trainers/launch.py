"""Run one training stage where `TrainExecution` says: here, under torchrun, or on Ray Train.
As a program (`python -m trainers.launch REQUEST`) it is one of the processes that torchrun starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from pydantic import Field

from dreamlite_data.dataset import DatasetError
from dreamlite_data.lake import Lake
from dreamlite_data.responses import write_whole
from dreamlite_data.strict_settings import StrictSettings
from trainers.device import use_device
from trainers.distributed import joined
from trainers.execution import Device, TrainExecution
from trainers.parallel import processors, use_threads
from trainers.settings import DMD2Settings, ModelSettings, ReFLSettings, SupervisedSettings
from trainers.stages import StoppedError, follow_checkpoint, train_stage

LOST_PEER = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection refused", "Connection reset")

ANSWER = "trained.json"
"""What the first process leaves in the stage's folder for the one that launched it: its metrics."""
REFUSALS = (ValueError, FloatingPointError, DatasetError, StoppedError)
"""What fails again however often its process is replaced: bad settings, bad rows, a loss that is not finite, a stage that stopped itself.
What may be of one machine or moment, such as a lost peer, a full disk or a missing GPU, is not among them."""


class StageRequest(StrictSettings):
    """A call of `train_stage` that can be sent to another process. All folders are seen by every process under these names."""

    stage: str
    settings: SupervisedSettings | ReFLSettings | DMD2Settings
    model: ModelSettings
    components: Path
    parent: Path | None
    lake: Path
    datasets: dict[str, int | None]
    output: Path
    seed: int
    threads: int | None = Field(None, description="threads of each process on CPUs; null shares the processors evenly")
    execution: TrainExecution
    launch: str = Field("", description="name of one launch of several processes, so that nothing an earlier one left speaks for it")
    device: Device = Field("auto", description="what each process computes on; on Ray `gpus_per_worker` says it")


def train(request: StageRequest, lake: Lake) -> dict[str, float]:
    """Train the stage and return its last metrics; `lake` is the open lake that `request.lake` names, for a run in this process.

    Raises what `train_stage` raises, and RuntimeError with the last lines of a launched process that failed.
    """
    if request.execution.runner == "plain":
        device = use_device(request.device)
        use_threads(request.threads, device)
        return _train_stage(request, lake, device)
    folders = {name: getattr(request, name) for name in ("components", "parent", "lake", "output")}
    moved = {name: path.absolute() for name, path in folders.items() if path}  # workers have another folder
    if isinstance(request.settings, ReFLSettings):
        seconds = {task: each.model_copy(update={"model": each.model.absolute()}) for task, each in request.settings.second_scorers.items()}
        moved["settings"] = request.settings.model_copy(update={"second_scorers": seconds})
    request = request.model_copy(update=moved | {"launch": uuid.uuid4().hex})
    if request.parent:  # which settings were left open is not said in what is sent
        request = request.model_copy(update={"model": follow_checkpoint(request.parent, request.model)})
    request.output.mkdir(parents=True, exist_ok=True)
    for left in (request.output / ANSWER, *request.output.glob("refusal-*")):
        left.unlink(missing_ok=True)
    if request.execution.runner == "ray":
        from trainers.ray_train import train_on_ray

        train_on_ray(request)
    else:
        _torchrun(request)
    return json.loads((request.output / ANSWER).read_text())


def train_here(request: StageRequest, on_checkpoint: Callable[[int, Mapping[str, float]], None] | None = None) -> None:
    """This process's part of a training that several share; the first one leaves the answer in the stage's folder.

    Raises RuntimeError at once where an earlier try was refused: only lost workers are worth another one.
    """
    refusal = request.output / f"refusal-{request.launch}.txt"
    if refusal.exists():
        raise RuntimeError(refusal.read_text())
    # Sharded rewards gather their weights in every call: calls on two threads would meet those of other processes out of order.
    one = request.execution.shard_rewards
    device = use_device(_wanted(request))
    use_threads(1 if one else request.threads or max(1, processors() // request.execution.most), device)
    with joined(device) as here, Lake(request.lake, read_only=True) as lake:
        try:
            metrics = _train_stage(request, lake, device, on_checkpoint)
        except REFUSALS as error:
            write_whole(refusal, f"{type(error).__name__}: {error}".encode())
            raise
        if here.first:
            write_whole(request.output / ANSWER, json.dumps(metrics).encode())


def _wanted(request: StageRequest) -> Device:
    """On Ray a worker has the GPU that was set aside for it or none: one without may still see those of others."""
    if request.execution.runner == "ray":
        return "cuda" if request.execution.gpus_per_worker else "cpu"
    return request.device


def _train_stage(
    request: StageRequest, lake: Lake, device: torch.device, on_checkpoint: Callable[[int, Mapping[str, float]], None] | None = None
) -> dict[str, float]:
    return train_stage(
        request.stage, request.settings, request.model, components=request.components, parent=request.parent, lake=lake,
        datasets=request.datasets, output=request.output, seed=request.seed, execution=request.execution, device=device,
        on_checkpoint=on_checkpoint,
    )  # fmt: skip


def _torchrun(request: StageRequest) -> None:
    """`workers` processes on this machine; where one is lost all of them start again from the checkpoint, `max_failures` times."""
    described = request.output / "request.json"
    described.write_text(request.model_dump_json())
    execution = request.execution
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(execution.most),
        "--max-restarts", str(execution.max_failures), "-m", "trainers.launch", str(described),
    ]  # fmt: skip
    package_root = str(Path(__file__).resolve().parents[1])
    paths = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "OMP_NUM_THREADS": "1"}
    log = request.output / "torchrun.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except BaseException:  # Ctrl-C: the processes must not train on without anybody to tell
            process.terminate()
            process.wait()
            raise
    if code:
        raise RuntimeError(f"stage {request.stage!r} failed under torchrun: {cause_in(log.read_text())} (all of it is in {log})")


def cause_in(log: str) -> str:
    """The line of a log of several processes that says why they ended. What the others say of the connection that the first failure
    closed comes last and tells nothing."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
    said = [line for line in errors if not any(sign in line for sign in LOST_PEER)] or errors or lines
    return said[-1] if said else "it said nothing"


if __name__ == "__main__":
    train_here(StageRequest.model_validate_json(Path(sys.argv[1]).read_text()))
