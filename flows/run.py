"""One run of a DAG of steps: plan it without computing, do what is not done, stop at a failed gate, remember it all.
Knows nothing of Prefect, so a run needs no server and survives the loss of one."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dreamlite_data.lake import Lake
from flows import lock
from flows.gates import Gate, check_gates
from flows.key import SourceTree, difference, digest
from flows.step import Step, StepRecord, append_rows, find_done, run_step


@dataclass(frozen=True)
class Planned:
    """One line of a plan. state: 'done' (skipped), 'to do', or 'waits' (its key needs the result of an earlier step)."""

    step: Step
    state: str
    key: str | None
    record: StepRecord | None
    why: str
    parts: dict[str, Any] = field(default_factory=dict)


def explain(step: str, parts: dict[str, Any], earlier: Iterable[StepRecord]) -> tuple[str, list[tuple[str, Any, Any]]]:
    """Why a step with these key parts is not done: (sentence, differences from the nearest earlier result).

    Nearest is the result with the fewest differing parts, the newest of them first.
    """
    candidates = [(difference(record.parts, parts), record) for record in earlier if record.step == step]
    if not candidates:
        return "never done in this lake", []
    changes, record = min(candidates, key=lambda pair: len(pair[0]))
    if not changes:
        if record.retries:
            return f"{record.retries} of its calls failed for a passing reason and are made again", []
        return f"done by run {record.run_id}, but files are missing in {record.directory}", []
    names = ", ".join(name for name, _, _ in changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")
    return f"changed since {record.id}: {names}", changes


def make_plan(steps: Sequence[Step], done: Sequence[StepRecord], sources: SourceTree) -> list[Planned]:
    """What a run of `steps` would do in a lake where `done` (newest first) is finished."""
    by_key = {(record.step, record.key): record for record in reversed(done) if record.settled()}
    planned: dict[str, Planned] = {}
    for step in steps:
        inputs = {name: planned[name].record for name in step.parents}
        if waiting := [name for name, record in inputs.items() if record is None]:
            planned[step.name] = Planned(step, "waits", None, None, "needs " + ", ".join(waiting))
            continue
        parts = step.parts(inputs, sources)
        key = digest(parts)
        record = by_key.get((step.name, key))
        why = f"done by {record.run_id}" if record else explain(step.name, parts, done)[0]
        planned[step.name] = Planned(step, "done" if record else "to do", key, record, why, parts)
    return list(planned.values())


class Run:
    """A DAG on its way. Build it, look at `plan()`, then call `start`, `do` for every step in order, and `finish`."""

    def __init__(
        self,
        lake: Lake,
        flow: str,
        steps: Sequence[Step],
        *,
        preset: str = "",
        config: dict[str, Any] | None = None,
        gates: Sequence[Gate] = (),
        say: Callable[[str], None] = print,
        sources: SourceTree | None = None,
    ) -> None:
        names = [step.name for step in steps]
        for at, step in enumerate(steps):
            if missing := [parent for parent in step.parents if parent not in names[:at]]:
                raise ValueError(f"step '{step.name}' reads {missing}, which do not come before it in flow '{flow}'")
        self.lake, self.flow, self.steps, self.preset, self.config = lake, flow, list(steps), preset, config or {}
        self.gates, self.say = list(gates), say
        self.sources = sources or SourceTree()
        self.run_id = f"{flow}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
        self.records: dict[str, StepRecord] = {}
        self.computed: list[str] = []
        self._skipped: list[dict[str, Any]] = []
        self._held: lock.Lock | None = None
        self._started = datetime.now(UTC)

    # -- before anything is computed

    def plan(self) -> list[Planned]:
        """What a run would do now, in order. Reads the lake once and computes nothing."""
        return make_plan(self.steps, find_done(self.lake), self.sources)

    def take_done(self, plan: Sequence[Planned]) -> None:
        """Accept a plan in which every step is done: gates are checked, the run is recorded, nothing is started."""
        self.start()
        try:
            for planned in plan:
                assert planned.record is not None
                self._skip(planned.step, planned.record)
                check_gates(self.gates, planned.step.name, self.records, self.say)
        except BaseException as error:
            self.finish("stopped", error)
            raise
        self.finish("done")

    # -- running

    def start(self) -> None:
        """Write the run's row and hold its lock, which tells a running run from a killed one."""
        mark_crashed(self.lake)
        self._held = lock.try_acquire(self.lake.root / "locks" / f"run-{self.run_id}.lock", run_id=self.run_id)
        self._started = datetime.now(UTC)
        append_rows(
            self.lake,
            {
                "runs": [
                    {
                        "run_id": self.run_id,
                        "flow": self.flow,
                        "preset": self.preset,
                        "config_json": json.dumps(self.config, sort_keys=True),
                        "git_commit": git_commit(),
                        "started_at": self._started,
                        "ended_at": None,
                        "state": "running",
                    }
                ]
            },
        )

    def do(self, step: Step) -> StepRecord:
        """Skip or compute one step, then check the gates that stand after it."""
        inputs = {name: self.records[name] for name in step.parents}
        parts = step.parts(inputs, self.sources)
        key = digest(parts)
        label = f"[{self.steps.index(step) + 1:>2}/{len(self.steps)}] {step.name}"
        done = find_done(self.lake, step.name)
        record = next((item for item in done if item.key == key and item.settled()), None)
        if record is not None:
            self._skip(step, record)
            self.say(f"{label}: skipped, done by {record.run_id}")
        else:
            why, _ = explain(step.name, parts, done)
            self.say(f"{label}: {why}" if why != "never done in this lake" else f"{label} ...")

            def waiting(owner: dict[str, Any]) -> None:
                self.say(f"{label}: waits for process {owner.get('pid')} on {owner.get('host')}, which is doing this step now")

            record, here = run_step(self.lake, step, parts, inputs, self.run_id, waiting, self._write_skipped)
            if here:
                self.computed.append(step.name)
                self.say(f"{label}: done in {record.seconds:.1f} s{_short(record.metrics)}")
            else:
                self._skip(step, record)
                self.say(f"{label}: skipped, just done by {record.run_id}")
        self.records[step.name] = record
        check_gates(self.gates, step.name, self.records, self.say)
        return record

    def _skip(self, step: Step, record: StepRecord) -> None:
        self.records[step.name] = record
        now = datetime.now(UTC)
        self._skipped.append(
            {
                "run_id": self.run_id,
                "step": step.name,
                "key": record.key,
                "state": "skipped",
                "started_at": now,
                "ended_at": now,
                "seconds": 0.0,
                "outputs_json": json.dumps({**record.outputs, "directory": str(record.directory), "done_by": record.run_id}),
                "metrics_json": json.dumps(record.metrics),
                "key_parts_json": None,
            }
        )

    def _write_skipped(self) -> None:
        """Skipped steps go to the lake together, and before a step that may read them (the report)."""
        skipped, self._skipped = self._skipped, []
        if skipped:
            append_rows(self.lake, {"steps": skipped})

    def finish(self, state: str, error: BaseException | None = None) -> None:
        """Record how the run ended: 'done', 'failed' or 'stopped'."""
        self._write_skipped()
        _end_run(self.lake, self.run_id, state)
        if self._held is not None:
            self._held.release()

    def run_all(self, each: Callable[[Step], Any] | None = None) -> None:
        """Do every step in order in this process. `each` may wrap `do`, as the Prefect flow does."""
        self.start()
        try:
            for step in self.steps:
                (each or self.do)(step)
        except BaseException as error:
            self.finish("stopped" if isinstance(error, KeyboardInterrupt) or getattr(error, "is_gate", False) else "failed", error)
            raise
        self.finish("done")


def _short(metrics: dict[str, float]) -> str:
    shown = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in list(metrics.items())[:4]]
    return " (" + ", ".join(shown) + ")" if shown else ""


def mark_crashed(lake: Lake) -> list[str]:
    """Give runs that say 'running' but whose process is gone the state 'crashed'; returns their ids."""
    rows = lake.query("SELECT run_id FROM runs WHERE state = 'running'").to_pylist()
    crashed = []
    for row in rows:
        path = lake.root / "locks" / f"run-{row['run_id']}.lock"
        owner = lock.read(path)
        if owner is None or not lock.alive(owner):
            _end_run(lake, row["run_id"], "crashed")
            path.unlink(missing_ok=True)
            crashed.append(row["run_id"])
    return crashed


def _end_run(lake: Lake, run_id: str, state: str) -> None:
    values = [state, datetime.now(UTC), run_id]
    lake.write(lambda connection: connection.execute("UPDATE runs SET state = ?, ended_at = ? WHERE run_id = ?", values))


def running_steps(lake: Lake) -> list[dict[str, Any]]:
    """Steps that a living process works on now: step, key, run_id, pid, host, since (unix seconds)."""
    found = []
    for path in sorted((lake.root / "locks").glob("*.lock")):
        owner = lock.read(path)
        if owner and "step" in owner and lock.alive(owner):
            found.append(owner)
    return found


def git_commit() -> str:
    """Commit of the source with '-dirty' when it was changed, '' outside a git checkout."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
