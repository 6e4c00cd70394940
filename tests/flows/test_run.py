"""A run skips what is done, redoes what changed and nothing else, goes on after a failure or kill -9, stops at a gate."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dreamlite_data.lake import Lake
from flows import lock
from flows.gates import Gate, GateFailed
from flows.key import digest
from flows.run import Run, mark_crashed, running_steps
from flows.step import Edge, Step, StepContext, StepFailed, StepResult, append_rows, lock_path, run_step

CODE = ("dreamlite_data.schema",)


class Pipeline:
    """Three tiny steps: numbers -> (double, report). Counts how often each really runs."""

    def __init__(self, start: int = 1, extra: int = 0, fail: bool = False) -> None:
        self.start, self.extra, self.fail, self.ran = start, extra, fail, []

    def numbers(self, ctx: StepContext) -> StepResult:
        self.ran.append("numbers")
        file = ctx.directory / "numbers.json"
        file.write_text(json.dumps([self.start, self.start + 1]))
        return StepResult({"file": file, "count": 2}, digests={"values": str(self.start // 10), "names": "constant"})

    def double(self, ctx: StepContext) -> StepResult:
        self.ran.append("double")
        if self.fail:
            raise ValueError("the disk is on fire")
        total = 2 * sum(json.loads(ctx.inputs["numbers"].path("file").read_text()))
        edge = Edge("checkpoint", f"double-{ctx.key[:12]}", "dataset", "numbers@1", "trained_on")
        rows = {"evals": [{"stage": "double", "task": "sum", "metric": "exact", "value": float(total), "n": 2}],
                "metrics": [{"name": "loss", "position": 1.0, "value": 0.5}]}  # fmt: skip
        return StepResult(metrics={"sum/exact": float(total)}, lineage=[edge], rows=rows)

    def report(self, ctx: StepContext) -> StepResult:
        self.ran.append("report")
        return StepResult(metrics={"seen": float(ctx.lake.count("evals"))})

    def steps(self) -> list[Step]:
        return [
            Step("numbers", self.numbers, CODE, spec={"start": self.start}),
            Step("double", self.double, CODE, spec={"extra": self.extra}, inputs=("numbers:values",)),
            Step("report", self.report, CODE, inputs=("double", "numbers")),
        ]

    def run(self, lake, **options) -> Run:
        run = Run(lake, "test", self.steps(), preset="tiny", say=lambda line: None, **options)
        run.run_all()
        return run


def states(lake, run: Run) -> dict[str, str]:
    rows = lake.query("SELECT step, state FROM steps WHERE run_id = ?", [run.run_id]).to_pylist()
    assert len(rows) == len({row["step"] for row in rows}), "one row per step and run"
    return {row["step"]: row["state"] for row in rows}


def test_first_run_does_all_and_the_second_nothing(lake):
    pipeline = Pipeline()
    first = pipeline.run(lake)
    assert pipeline.ran == ["numbers", "double", "report"]
    assert states(lake, first) == {"numbers": "done", "double": "done", "report": "done"}
    second = Run(lake, "test", pipeline.steps(), say=lambda line: None)
    plan = second.plan()
    assert [planned.state for planned in plan] == ["done"] * 3
    second.take_done(plan)
    assert pipeline.ran == ["numbers", "double", "report"]
    assert states(lake, second) == {"numbers": "skipped", "double": "skipped", "report": "skipped"}
    assert lake.query("SELECT state FROM runs ORDER BY started_at")["state"].to_pylist() == ["done", "done"]


def test_what_a_step_returns_is_in_the_lake_in_one_commit(lake):
    run = Pipeline().run(lake)
    double = run.records["double"]
    assert lake.query("SELECT run_id, stage, value, n FROM evals").to_pylist() == [
        {"run_id": run.run_id, "stage": "double", "value": 6.0, "n": 2}
    ]
    assert lake.query("SELECT step, name, value FROM metrics").to_pylist() == [{"step": "double", "name": "loss", "value": 0.5}]
    edges = lake.query("SELECT child_id, parent_id, role FROM lineage").to_pylist()
    assert {"child_id": double.id, "parent_id": "numbers@1", "role": "trained_on"} in edges
    assert {"child_id": run.records["report"].id, "parent_id": double.id, "role": "input"} in edges


def test_a_changed_spec_redoes_that_step_and_its_readers_only(lake):
    Pipeline().run(lake)
    changed = Pipeline(extra=1)
    plan = Run(lake, "test", changed.steps()).plan()
    assert [(planned.step.name, planned.state) for planned in plan] == [("numbers", "done"), ("double", "to do"), ("report", "waits")]
    assert "spec.extra" in plan[1].why
    run = changed.run(lake)
    assert changed.ran == ["double", "report"]
    assert states(lake, run)["numbers"] == "skipped"
    back = Pipeline()
    back.run(lake)
    assert back.ran == [], "turning the setting back finds the old result"


def test_a_rerun_upstream_with_the_same_content_is_cut_off(lake):
    Pipeline(start=1).run(lake)
    same = Pipeline(start=2)  # another key, but its outputs' digests are equal
    same.run(lake)
    assert same.ran == ["numbers"]
    other = Pipeline(start=10)
    other.run(lake)
    assert other.ran == ["numbers", "double", "report"]


def test_lost_files_are_made_again(lake):
    pipeline = Pipeline()
    run = pipeline.run(lake)
    run.records["numbers"].path("file").unlink()
    again = Pipeline()
    plan = Run(lake, "test", again.steps()).plan()
    assert plan[0].state == "to do" and "files are missing" in plan[0].why
    again.run(lake)
    assert again.ran == ["numbers"]


def test_a_failure_is_recorded_and_the_next_run_goes_on_from_it(lake):
    broken = Pipeline(fail=True)
    with pytest.raises(StepFailed, match="'double' failed: ValueError: the disk is on fire"):
        broken.run(lake)
    assert lake.query("SELECT state FROM runs")["state"].to_pylist() == ["failed"]
    row = lake.query("SELECT outputs_json FROM steps WHERE state = 'failed'").to_pylist()[0]
    assert "the disk is on fire" in json.loads(row["outputs_json"])["error"]
    healed = Pipeline()
    healed.run(lake)
    assert healed.ran == ["double", "report"]


def test_a_failed_gate_stops_with_the_numbers_and_moving_it_redoes_nothing(lake):
    gate = Gate(after="double", metric="sum/exact", min=7.0)
    pipeline = Pipeline()
    with pytest.raises(GateFailed, match=r"sum/exact after double is 6\.0000, the gate asks for at least 7"):
        pipeline.run(lake, gates=[gate])
    assert pipeline.ran == ["numbers", "double"]
    pipeline.run(lake, gates=[gate.model_copy(update={"min": 6.0})])
    assert pipeline.ran == ["numbers", "double", "report"]
    with pytest.raises(GateFailed):  # a plan in which all is done still looks at the gates
        run = Run(lake, "test", pipeline.steps(), gates=[gate], say=lambda line: None)
        run.take_done(run.plan())


def test_calls_that_failed_for_a_passing_reason_are_made_again_by_the_next_run(lake):
    waiting, seen = [2, 1, 1, 0], []

    def captions(ctx: StepContext) -> StepResult:
        return StepResult(retries=waiting.pop(0))

    def curate(ctx: StepContext) -> StepResult:
        seen.append(ctx.inputs["captions"].retries)
        return StepResult()

    steps = [Step("captions", captions, CODE), Step("curate", curate, CODE, inputs=("captions",))]

    def run() -> Run:
        made = Run(lake, "test", steps, say=lambda line: None)
        made.run_all()
        return made

    run()
    first, reader = Run(lake, "test", steps).plan()
    assert (first.state, reader.state) == ("to do", "waits") and first.why == "2 of its calls failed for a passing reason and are made again"
    assert run().computed == ["captions", "curate"]
    assert run().computed == ["captions"]  # still one waiting: nothing new for its reader
    assert run().computed == ["captions", "curate"]
    assert seen == [2, 1, 0] and not waiting
    assert [planned.state for planned in Run(lake, "test", steps).plan()] == ["done", "done"]


def test_a_gate_may_bound_a_metric_from_above(lake):
    with pytest.raises(GateFailed, match=r"sum/exact after double is 6\.0000, the gate allows at most 5"):
        Pipeline().run(lake, gates=[Gate(after="double", metric="sum/exact", max=5.0)])
    Pipeline().run(lake, gates=[Gate(after="double", metric="sum/exact", max=6.0)])


def test_a_gate_on_a_metric_nobody_reports_is_an_error_not_a_pass(lake):
    with pytest.raises(GateFailed, match="which reports"):
        Pipeline().run(lake, gates=[Gate(after="double", metric="sum/exakt", min=0.0)])


def test_an_output_outside_the_step_directory_or_missing_fails_the_step(lake):
    step = Step("numbers", lambda ctx: StepResult({"file": ctx.directory / "absent.bin"}), CODE)
    with pytest.raises(StepFailed, match="absent.bin, which does not exist"):
        Run(lake, "test", [step], say=lambda line: None).run_all()


def test_steps_out_of_order_are_refused(lake):
    with pytest.raises(ValueError, match="do not come before"):
        Run(lake, "test", list(reversed(Pipeline().steps())))


SLOW = """
import sys, time
from pathlib import Path
from dreamlite_data.lake import Lake
from flows.run import Run
from flows.step import Step, StepResult

def work(ctx):
    "Four units of a quarter second, each kept in the step's directory as it is done."
    for unit in range(4):
        file = ctx.directory / f"unit{unit}"
        if not file.exists():
            time.sleep(float(sys.argv[2]))
            file.write_text("x")
            with open(Path(sys.argv[1]) / "work.log", "a") as log:
                log.write(f"{unit}\\n")
    return StepResult({"units": ctx.directory / "unit3"})

lake = Lake(sys.argv[1])
run = Run(lake, "slow", [Step("slow", work, ("dreamlite_data.schema",))], say=lambda line: print(line, flush=True))
run.run_all()
"""


def start(lake, seconds: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(lake.root), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "DREAMLITE_PROGRESS": "1"},
    )


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def log_of(lake) -> list[str]:
    log = Path(lake.root) / "work.log"
    return log.read_text().split() if log.exists() else []


def test_kill_9_keeps_finished_units_and_the_next_run_takes_over(lake):
    victim = start(lake, 2.0)  # slow units: a busy machine must not finish it before the signal comes
    wait_for(lambda: len(log_of(lake)) >= 2)
    assert [owner["step"] for owner in running_steps(lake)] == ["slow"]
    with Lake(lake.root, read_only=True) as reader:  # somebody asks while the run goes on
        assert reader.query_read_only("SELECT flow, state FROM runs").to_pylist() == [{"flow": "slow", "state": "running"}]
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert running_steps(lake) == []
    assert lake.query("SELECT count(*) AS n FROM steps")["n"][0].as_py() == 0, "not done, so not in the lake"
    assert len(mark_crashed(lake)) == 1
    assert lake.query("SELECT state FROM runs")["state"].to_pylist() == ["crashed"]
    survivor = start(lake, 0.0)
    out, _ = survivor.communicate(timeout=60)
    assert survivor.returncode == 0, out
    assert sorted(log_of(lake)) == ["0", "1", "2", "3"], "no unit lost, none done twice"
    assert lake.query("SELECT state FROM steps")["state"].to_pylist() == ["done"]


def test_two_processes_with_one_key_do_the_work_once(lake):
    first, second = start(lake, 0.3), start(lake, 0.3)
    outs = [process.communicate(timeout=90)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outs
    assert sorted(log_of(lake)) == ["0", "1", "2", "3"]
    assert sorted(lake.query("SELECT state FROM steps")["state"].to_pylist()) == ["done", "skipped"]


@pytest.mark.parametrize("other_succeeds", [True, False])
def test_who_waited_takes_what_the_other_one_did_and_nothing_older(lake, other_succeeds):
    """A record with failed calls is left to be done again; another process that fails meanwhile makes it no better."""
    ran = []

    def work(ctx: StepContext) -> StepResult:
        ran.append(ctx.run_id)
        return StepResult({"retries": 1})

    step, parts, told = Step("work", work, CODE), {"spec": 1}, threading.Event()
    run_step(lake, step, parts, {}, "earlier")
    path = lock_path(lake, "work", digest(parts))
    held = lock.try_acquire(path, step="work")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(run_step, lake, step, parts, {}, "waiting", lambda owner: told.set())
        assert told.wait(60)
        if other_succeeds:
            row = lake.query("SELECT * FROM steps").to_pylist()[0] | {"run_id": "other", "ended_at": datetime.now(UTC)}
            append_rows(lake, {"steps": [row]})
        held.release()
        record, here = waiting.result(60)
    assert (record.run_id, here, ran) == (("other", False, ["earlier"]) if other_succeeds else ("waiting", True, ["earlier", "waiting"]))
