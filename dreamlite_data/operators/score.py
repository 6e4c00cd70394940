"""Score captions with an HPSv3-class reward and edit triplets with an EditReward-class reward.
Each worker loads a reward model once; a row that cannot be scored is a row with its reason."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from dreamlite_data import schema
from dreamlite_data.inference import worker_threads
from dreamlite_data.sources.base import DigestCache

TASKS = ("generate", "edit")


@functools.cache
def reward_model(directory: str) -> Any:
    """The reward model of a folder, loaded once per process."""
    from dreamlite_data.rewards import load_reward

    return load_reward(Path(directory))


def weights_digest(directory: Path, digests: DigestCache) -> str:
    """One digest over every file of a reward's directory, found without loading the model."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    if not files:
        raise FileNotFoundError(f"no reward model at {directory}: build the components first, or point the setting at a model directory")
    # Not the form of `weights.weights_digest`: this one is in the key of every score that a lake holds.
    return " ".join(f"{path.relative_to(directory)}={digests.digest(path)}" for path in files)


class Score:
    """Operator over captions (task 'generate') or triplets (task 'edit')."""

    version = 1
    table = "scores"
    schema = schema.CONTENT["scores"]

    def __init__(self, task: str, directory: Path, weights: str) -> None:
        if task not in TASKS:
            raise ValueError(f"there is no scoring task {task!r}: the tasks are {', '.join(TASKS)}")
        self.task, self.directory, self.weights = task, str(directory), weights
        self.name = f"score_{task}"
        self.reads = ("subject_id", "text", "image_bytes") + (("source_bytes",) if task == "edit" else ())
        self.resources = {"num_cpus": 1.0}

    def config(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def __call__(self, rows: pa.Table) -> pa.Table:
        with worker_threads():
            return self._scored(rows)

    def _scored(self, rows: pa.Table) -> pa.Table:
        model = reward_model(self.directory)
        images = [_open(payload) for payload in rows["image_bytes"].to_pylist()]
        sources = [_open(payload) for payload in rows["source_bytes"].to_pylist()] if self.task == "edit" else None
        scores = model.score(images, rows["text"].to_pylist(), sources)
        errors = list(scores.errors)
        bad = np.array([error is not None for error in errors], dtype=bool)
        columns = {
            "subject_id": rows["subject_id"],
            "op_version": pa.nulls(len(rows), pa.string()),
            "task": pa.array([self.task] * len(rows), pa.string()),
            "scorer_id": pa.array([model.scorer_id] * len(rows), pa.string()),
            "mu": pa.array(scores.mu, pa.float32(), mask=bad),
            "log_sigma": pa.array(scores.log_sigma, pa.float32(), mask=bad),
            "error": pa.array(errors, pa.string()),
        }
        return pa.table(columns, schema=self.schema)


def _open(payload: bytes) -> Image.Image:
    return Image.open(io.BytesIO(payload)).convert("RGB")
