"""A tracked step of the DAG: a pure function of (inputs, spec, code), keyed by their hash and recorded in the lake.
What is done is never done again; what was cut off goes on where it stopped; two processes never do it twice."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dreamlite_data.lake import Lake
from dreamlite_data.schema import TABLES
from flows import lock
from flows.key import KEY_SCHEMA, SourceTree, canonical_json, digest

POLL_S = 0.5
"""Seconds between two looks at a lock that another process holds."""


class StepFailed(RuntimeError):
    """A step raised; carries the step's name and folder, and the original error as its cause."""

    def __init__(self, step: str, directory: Path, error: BaseException) -> None:
        super().__init__(f"step '{step}' failed: {type(error).__name__}: {error}")
        self.step, self.directory = step, directory


@dataclass(frozen=True)
class Edge:
    """One edge of the lineage graph, from what was made to what it was made from."""

    child_kind: str
    child_id: str
    parent_kind: str
    parent_id: str
    role: str


@dataclass
class StepResult:
    """What a step function hands back.

    outputs: plain JSON values, or Paths inside the step's directory (checked for before a later run skips the step).
    metrics: numbers for people and for gates.
    digests: content of the outputs by item; a step that reads 'curate:t2i' sees only digests['t2i']. Without them
        the readers see the step's key, so any re-run upstream re-runs them too.
    rows: further rows for the same transaction, by lake table (checkpoints, artifacts, evals, metrics).
    retries: calls that failed for a passing reason. A step that has such is done for this run alone: the next run does it again.
    """

    outputs: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    lineage: list[Edge] = field(default_factory=list)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    retries: int = 0


@dataclass
class StepRecord:
    """A finished step as the lake remembers it."""

    step: str
    key: str
    run_id: str
    seconds: float
    directory: Path
    outputs: dict[str, Any]
    metrics: dict[str, float]
    digests: dict[str, str]
    parts: dict[str, Any]
    ended_at: datetime | None = None

    @property
    def id(self) -> str:
        """Short name used in the lineage table and on screen."""
        return step_id(self.step, self.key)

    def path(self, name: str) -> Path:
        """The file or folder that the step returned under `name`."""
        try:
            return self.directory / self.outputs["paths"][name]
        except KeyError:
            raise KeyError(f"step '{self.step}' has no output file '{name}'; it has {sorted(self.outputs.get('paths', {}))}") from None

    def digest_of(self, item: str) -> str:
        if not item:
            return digest(self.digests) if self.digests else self.key
        try:
            return self.digests[item]
        except KeyError:
            raise KeyError(f"step '{self.step}' has no output '{item}'; it has {sorted(self.digests)}") from None

    @property
    def retries(self) -> int:
        """Calls that failed for a passing reason, which the next run makes again."""
        return self.outputs.get("retries", 0)

    def settled(self) -> bool:
        """Whether a later run may skip the step: nothing is to be tried again, and its files are there."""
        return not self.retries and self.present()

    def present(self) -> bool:
        """Whether every file it returned still stands with the size it had."""
        return all(
            (self.directory / name).is_file() and (self.directory / name).stat().st_size == size
            for name, size in self.outputs.get("files", {}).items()
        )


@dataclass
class StepContext:
    """What a step function may use. It has no clock, no global state and no random source but `seed`."""

    lake: Lake
    directory: Path
    inputs: dict[str, StepRecord]
    seed: int
    key: str
    run_id: str

    def say(self, text: str) -> None:
        """One plain line for the person who watches."""
        from dreamlite_data.progress import Progress

        if not Progress.quiet():
            print(f"  {text}", flush=True)


@dataclass(frozen=True)
class Step:
    """One node of the DAG.

    name: as in the DAG; also the folder of its outputs.
    run: the work: glue around the functions in `code`. Its own text is in no key; whoever changes what it passes on
        raises `flows.key.KEY_SCHEMA`.
    spec: JSON values that can change the result (never paths, workers, threads: see `flows.key.spec_of`).
    inputs: names of earlier steps, or 'step:item' to depend on one output of it only.
    code: modules whose source, with all they import within the project, is part of the key.
    alone: modules whose own source counts but not what they import (dispatchers that import everything lazily).
    external: digests of things outside the lake, taken when planning (files in a source folder).
    """

    name: str
    run: Callable[[StepContext], StepResult]
    code: tuple[str, ...]
    spec: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    external: Callable[[], Mapping[str, str]] | None = None
    seed: int = 0
    about: str = ""

    @property
    def parents(self) -> list[str]:
        return list(dict.fromkeys(name.split(":")[0] for name in self.inputs))

    def parts(self, inputs: Mapping[str, StepRecord], sources: SourceTree) -> dict[str, Any]:
        """Everything the key is made of, readable; `inputs` holds the finished record of every parent."""
        return {
            "step": self.name,
            "schema": KEY_SCHEMA,
            "seed": self.seed,
            "spec": json.loads(canonical_json(self.spec)),
            "inputs": {name: inputs[name.split(":")[0]].digest_of(name.partition(":")[2]) for name in self.inputs},
            "external": dict(self.external()) if self.external else {},
            "code": sources.digests(self.code, self.alone),
        }


def step_id(step: str, key: str) -> str:
    """'t2i-0123456789ab': names a step's result in lineage, folders apart."""
    return f"{step}-{key[:12]}"


def directory_of(lake: Lake, step: str, key: str) -> Path:
    """Where the step with this key keeps its files. Derived, so that a lake that was moved is still found."""
    return lake.files / step / key


def lock_path(lake: Lake, step: str, key: str) -> Path:
    return lake.root / "locks" / f"{step}-{key[:16]}.lock"


def find_done(lake: Lake, step: str | None = None) -> list[StepRecord]:
    """Finished steps of all runs, newest first."""
    where, values = ("WHERE state = 'done' AND step = ?", [step]) if step else ("WHERE state = 'done'", [])
    rows = lake.query(
        "SELECT step, key, run_id, seconds, ended_at, outputs_json, metrics_json, key_parts_json "
        f"FROM steps {where} ORDER BY ended_at DESC",
        values,
    ).to_pylist()
    return [_record(lake, row) for row in rows]


def _record(lake: Lake, row: Mapping[str, Any]) -> StepRecord:
    outputs = json.loads(row["outputs_json"] or "{}")
    return StepRecord(
        step=row["step"],
        key=row["key"],
        run_id=row["run_id"],
        seconds=row["seconds"] or 0.0,
        directory=directory_of(lake, row["step"], row["key"]),
        outputs=outputs,
        metrics=json.loads(row["metrics_json"] or "{}"),
        digests=outputs.get("digests", {}),
        parts=json.loads(row["key_parts_json"] or "{}"),
        ended_at=row["ended_at"],
    )


def run_step(
    lake: Lake,
    step: Step,
    parts: Mapping[str, Any],
    inputs: dict[str, StepRecord],
    run_id: str,
    on_wait: Callable[[dict[str, Any]], None] = lambda owner: None,
    before: Callable[[], None] = lambda: None,
) -> tuple[StepRecord, bool]:
    """Do the step, or find that another process has just done it. Returns (record, whether it was computed here).

    `before` is called right before the work, and not when another process has done it.
    Raises StepFailed after writing a 'failed' row; the directory stays, and the next try goes on from it.
    """
    key = digest(parts)
    path = lock_path(lake, step.name, key)
    began, waited = datetime.now(UTC), False
    while (held := lock.try_acquire(path, step=step.name, key=key, run_id=run_id)) is None:
        if not waited:
            on_wait(lock.read(path) or {})
            waited = True
        time.sleep(POLL_S)
    try:
        for record in find_done(lake, step.name):
            # What another one did while this one waited holds even if calls of it failed: they were made just now.
            if record.key == key and (record.settled() or (record.ended_at >= began and record.present())):
                return record, False
        before()
        return _compute(lake, step, key, parts, inputs, run_id, held), True
    finally:
        held.release()


def _compute(
    lake: Lake, step: Step, key: str, parts: Mapping[str, Any], inputs: dict[str, StepRecord], run_id: str, held: lock.Lock
) -> StepRecord:
    directory = directory_of(lake, step.name, key)
    directory.mkdir(parents=True, exist_ok=True)
    started, clock = datetime.now(UTC), time.monotonic()

    def row(state: str, outputs: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "run_id": run_id,
            "step": step.name,
            "key": key,
            "state": state,
            "started_at": started,
            "ended_at": datetime.now(UTC),
            "seconds": time.monotonic() - clock,
            "outputs_json": json.dumps(outputs),
            "metrics_json": json.dumps(metrics),
            "key_parts_json": canonical_json(parts),
        }

    try:
        result = step.run(StepContext(lake, directory, inputs, step.seed, key, run_id))
        outputs = _outputs(step, key, directory, result)
        held.check()
        done = row("done", outputs, result.metrics)
        edges = [*result.lineage, *(Edge("step", step_id(step.name, key), "step", inputs[name].id, "input") for name in step.parents)]
        rows = {
            **{table: [{"run_id": run_id, "step": step.name, **item} for item in items] for table, items in result.rows.items()},
            "lineage": [vars(edge) for edge in edges],
            "steps": [done],
        }
        append_rows(lake, {table: items for table, items in rows.items() if items})
        return _record(lake, done)
    except (Exception, KeyboardInterrupt) as error:
        state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        outputs = {"directory": str(directory), "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        append_rows(lake, {"steps": [row(state, outputs, {})]})
        if isinstance(error, KeyboardInterrupt):
            raise
        raise StepFailed(step.name, directory, error) from error


def _outputs(step: Step, key: str, directory: Path, result: StepResult) -> dict[str, Any]:
    """The result's outputs as stored: plain values; files as paths relative to the directory, with their sizes."""
    values = {name: value for name, value in result.outputs.items() if not isinstance(value, Path)}
    paths, files = {}, {}
    for name, value in result.outputs.items():
        if not isinstance(value, Path):
            continue
        if not value.exists():
            raise FileNotFoundError(f"step '{step.name}' returned output '{name}' at {value}, which does not exist")
        paths[name] = str(value.relative_to(directory))
        for file in [value] if value.is_file() else sorted(value.rglob("*")):
            if file.is_file():
                files[str(file.relative_to(directory))] = file.stat().st_size
    digests = result.digests
    if result.retries and not digests:  # what a retry brings must reach the readers, which see the key alone where all went well
        digests = {"all": digest([key, result.retries])}
    return {"directory": str(directory), "paths": paths, "files": files, "digests": digests, "retries": result.retries, **values}


def append_rows(lake: Lake, rows: Mapping[str, list[dict[str, Any]]]) -> None:
    """Append plain dict rows to tracking tables in one transaction; fields that a table does not have are left out."""
    lake.append({name: [{column: item.get(column) for column in TABLES[name].names} for item in items] for name, items in rows.items()})
