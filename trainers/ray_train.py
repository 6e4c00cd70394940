"""A training stage on Ray Train: the same loop in every worker, with the checkpoints that the loop writes itself.
Ray brings the workers up, joins them in a process group and replaces those that are lost; it holds no state of the training."""

from __future__ import annotations

import json
import math
import os
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamlite_data.executors import RayExecutor
from dreamlite_data.ray_workers import room
from trainers.distributed import PATIENCE_S, backend
from trainers.execution import TrainExecution
from trainers.launch import StageRequest, train_here

CONTROLLER_FAILURES = 2
"""Starts of the worker group that may fail or time out: by default Ray tries for ever."""


def train_on_ray(request: StageRequest) -> None:
    """Train the stage on the cluster at RAY_ADDRESS, or on a Ray of this machine. The answer is in the stage's folder.

    Raises RuntimeError where the cluster has no room for the fewest workers, or what the workers raised.
    """
    execution = request.execution
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(execution.start_timeout_s)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process that only clusters with such nodes need
    with RayExecutor(max(math.ceil(execution.most * execution.cpus_per_worker), os.cpu_count() or 1)) as executor:
        ray = executor.start()
        refuse_too_small(ray.nodes(), execution)
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError

        resources: dict[str, float] = {"CPU": execution.cpus_per_worker}
        if execution.gpus_per_worker:
            resources["GPU"] = execution.gpus_per_worker
        trainer = TorchTrainer(
            worker,
            train_loop_config={"request": request.model_dump_json()},
            torch_config=TorchConfig(backend=backend("cuda" if execution.gpus_per_worker else "cpu"), timeout_s=int(PATIENCE_S)),
            scaling_config=ScalingConfig(
                num_workers=execution.workers, use_gpu=execution.gpus_per_worker > 0, resources_per_worker=resources
            ),
            run_config=RunConfig(
                # A name that was used before would be a silent resume of that run; ours resumes from its own checkpoint.
                name=f"{request.stage}-{uuid.uuid4().hex[:8]}",
                storage_path=str(request.output / "ray"),
                failure_config=FailureConfig(max_failures=execution.max_failures, controller_failure_limit=CONTROLLER_FAILURES),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise RuntimeError(f"stage {request.stage!r} failed on Ray Train: {lines[-1].strip() if lines else type(error).__name__}") from error


def refuse_too_small(nodes: list[Mapping[str, Any]], execution: TrainExecution) -> None:
    """Raise RuntimeError where the fewest workers do not fit: Ray would wait for them without a word."""
    wanted = {"num_cpus": execution.cpus_per_worker, "num_gpus": execution.gpus_per_worker}
    fits = room(nodes, wanted)
    if fits < execution.least:
        raise RuntimeError(
            f"the Ray cluster has room for {fits} workers of {execution.cpus_per_worker:g} CPUs and {execution.gpus_per_worker} GPUs, and"
            f" {execution.least} are the fewest that exec.train.workers allows: lower workers or cpus_per_worker, or add nodes"
        )


def worker(config: dict[str, Any]) -> None:
    """What each worker runs; Ray has joined the processes already. Reports at checkpoints only: each one costs seconds."""
    import ray.train

    request = StageRequest.model_validate_json(config["request"])

    def report(position: int, metrics: Mapping[str, float]) -> None:
        numbers = {name: float(value) for name, value in metrics.items()} | {"position": position}
        with tempfile.TemporaryDirectory() as folder:
            # Ray wants a folder of its own. The weights stay where the loop wrote them; this one says where.
            Path(folder, "state.json").write_text(json.dumps({"state": str(request.output / "state.pt"), "position": position}))
            first = ray.train.get_context().get_world_rank() == 0
            ray.train.report(numbers, checkpoint=ray.train.Checkpoint.from_directory(folder) if first else None)

    train_here(request, report)
