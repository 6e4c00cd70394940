"""Score captions and edit triplets with a reward model or a further scorer.
Two stages: packing needs no weights and runs on CPUs; scoring sees packed arrays only. A row that cannot be scored says why."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dreamlite_data import schema
from dreamlite_data.inference import worker_threads
from dreamlite_data.model_settings import ScoringSettings
from dreamlite_data.sources.base import DigestCache

TASKS = ("generate", "edit")
REWARD = "reward"
"""The kind of the task's own reward model; every other kind is a further scorer beside it."""
HEAD_COLUMNS = {"follow": ("follow_mu", "follow_log_sigma"), "quality": ("quality_mu", "quality_log_sigma")}
"""Columns of EditReward's heads; a model with one head has only mu and log_sigma."""


@functools.cache
def reward_model(directory: str) -> Any:
    """The reward model of a folder, loaded once per process, on the CPU."""
    return scorer(REWARD, directory, "float32", False)


@functools.cache
def scorer(kind: str, directory: str, dtype: str, on_gpu: bool) -> Any:
    """The scorer of a folder, loaded once per process."""
    import torch

    from dreamlite_data.rewards import load_scorer

    device = "cuda" if on_gpu and torch.cuda.is_available() else "cpu"
    return load_scorer(kind, Path(directory), device, getattr(torch, dtype))


@functools.cache
def packer(kind: str, directory: str) -> Any:
    """What packs images and prompts for the scorer of a folder, loaded once per process, without weights."""
    from dreamlite_data.rewards import load_scorer_packer

    return load_scorer_packer(kind, Path(directory))


def weights_digest(directory: Path, digests: DigestCache) -> str:
    """One digest over every file of a reward's directory, found without loading the model."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    if not files:
        raise FileNotFoundError(f"no reward model at {directory}: build the components first, or point the setting at a model directory")
    # Not the form of `weights.weights_digest`: this one is in the key of every score that a lake holds.
    return " ".join(f"{path.relative_to(directory)}={digests.digest(path)}" for path in files)


class Score:
    """Operator over captions (task 'generate') or triplets (task 'edit'). `kind` is 'reward' or that of a further scorer, whose
    rows go to the same table under an operator of their own, so that the task's reward stays what it is."""

    version = 1
    table = "scores"
    schema = schema.CONTENT["scores"]

    def __init__(self, task: str, directory: Path, weights: str, settings: ScoringSettings | None = None, kind: str = REWARD) -> None:
        if task not in TASKS:
            raise ValueError(f"there is no scoring task {task!r}: the tasks are {', '.join(TASKS)}")
        self.task, self.directory, self.weights, self.kind = task, str(directory), weights, kind
        self.settings = settings or ScoringSettings()
        self.name = f"score_{task}" if kind == REWARD else f"score_{task}_{kind}"
        # A further scorer judges the image alone or with its text; only a reward of edits looks at the picture before.
        self.with_sources = task == "edit" and kind == REWARD
        self.reads = ("subject_id", "text", "image_bytes") + (("source_bytes",) if self.with_sources else ())
        self.resources = {"num_cpus": 1.0} | ({"num_gpus": self.settings.num_gpus} if self.settings.num_gpus else {})

    def config(self) -> dict[str, Any]:
        # Scores of older lakes are keyed by the weights alone; they were made in float32.
        return {"weights": self.weights} | ({"dtype": self.settings.dtype} if self.settings.dtype != "float32" else {})

    def __call__(self, rows: pa.Table) -> pa.Table:
        return self.infer(self.prepare(rows))

    def prepare(self, rows: pa.Table) -> dict[str, Any]:
        """Decode, resize, tokenize: {'subjects', 'packed'}, with no weight loaded."""
        sources = rows["source_bytes"].to_pylist() if self.with_sources else None
        with worker_threads():
            packed = packer(self.kind, self.directory).pack(rows["image_bytes"].to_pylist(), rows["text"].to_pylist(), sources)
        return {"subjects": rows["subject_id"], "packed": packed}

    def infer(self, prepared: dict[str, Any]) -> pa.Table:
        """The scores of packed rows, as rows of the table, in batches of as many tokens as the settings say."""
        with worker_threads():
            model = scorer(self.kind, self.directory, self.settings.dtype, bool(self.settings.num_gpus))
            scores = model.score_packed(prepared["packed"], self.settings.batch_tokens)
        count = len(scores.errors)
        bad = np.array([error is not None for error in scores.errors], dtype=bool)
        columns = {
            "subject_id": prepared["subjects"],
            "op_version": pa.nulls(count, pa.string()),
            "task": pa.array([self.task] * count, pa.string()),
            "scorer_id": pa.array([model.scorer_id] * count, pa.string()),
            "mu": pa.array(scores.mu, pa.float32(), mask=bad),
            # A scorer without uncertainty has none to store.
            "log_sigma": pa.array(scores.log_sigma, pa.float32(), mask=bad | ~np.isfinite(scores.log_sigma)),
            "error": pa.array(scores.errors, pa.string()),
            "n_tokens": pa.array(scores.tokens, pa.int32(), mask=bad),
            **self._heads(model.head_names, scores.heads, bad),
        }
        return pa.table({name: columns[name] for name in self.schema.names}, schema=self.schema)

    @staticmethod
    def _heads(names: tuple[str, ...], heads: np.ndarray, bad: np.ndarray) -> dict[str, pa.Array]:
        found: dict[str, pa.Array] = {column: pa.nulls(len(bad), pa.float32()) for pair in HEAD_COLUMNS.values() for column in pair}
        for place, name in enumerate(names):
            for index, column in enumerate(HEAD_COLUMNS.get(name, ())):
                found[column] = pa.array(np.ascontiguousarray(heads[:, place, index]), pa.float32(), mask=bad)
        return found
