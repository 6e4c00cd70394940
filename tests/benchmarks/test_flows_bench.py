"""What tracking costs: per step, for a run with nothing to do, for help and for a question."""

import subprocess
import sys

import pytest

from dreamlite_data.lake import Lake
from flows.key import SourceTree
from flows.run import Run
from flows.step import Step, StepResult

pytestmark = pytest.mark.benchmark

STEPS = 23
"""As many as `retrain` has."""

NO_OP = """
import sys
from pathlib import Path
from flows import engine
from flows.step import Step, StepResult
names = [f"step{number}" for number in range(int(sys.argv[2]))]
engine.build_steps = lambda flow, config: [
    Step(name, lambda ctx: StepResult(), ("dreamlite_data.refresh",), inputs=tuple(names[:at][-1:])) for at, name in enumerate(names)
]
engine.execute("retrain", "smoke", Path(sys.argv[1]), engine="inline")
"""


def chain() -> list[Step]:
    names = [f"step{number}" for number in range(STEPS)]
    return [
        Step(name, lambda ctx: StepResult(metrics={"value": 1.0}), ("dreamlite_data.schema",), inputs=tuple(names[:at][-1:]))
        for at, name in enumerate(names)
    ]


def test_overhead_of_a_step(bench, tmp_path):
    with Lake(tmp_path / "lake") as lake:
        run = Run(lake, "bench", chain(), say=lambda line: None)
        bench("step_overhead_ms", 1000 * bench.best_of(1, run.run_all) / STEPS, 100)
        assert len(run.computed) == STEPS
        again = Run(lake, "bench", chain(), say=lambda line: None)
        plan = bench.best_of(3, again.plan)
        assert all(planned.state == "done" for planned in again.plan())
        bench("plan_of_done_run_s", plan, 0.5)


def test_keys_of_the_whole_project(bench):
    def digests() -> None:
        SourceTree().digests(["trainers.stages", "flows.cli", "flows.report"])

    bench("source_digests_s", bench.best_of(3, digests), 1.0)


def test_a_run_with_nothing_to_do_from_a_cold_start(bench, tmp_path):
    command = [sys.executable, "-c", NO_OP, str(tmp_path / "lake"), str(STEPS)]
    subprocess.run(command, check=True, capture_output=True)

    def again() -> None:
        assert "nothing to do" in subprocess.run(command, check=True, capture_output=True, text=True).stdout

    bench("no_op_run_s", bench.best_of(3, again), 5)


def test_help_and_a_question_from_a_cold_start(bench, tmp_path):
    Lake(tmp_path / "lake").close()
    dreamlite = [sys.executable, "-m", "flows.cli"]
    bench("help_s", bench.best_of(3, lambda: subprocess.run([*dreamlite, "--help"], check=True, capture_output=True)), 1.0)
    question = [*dreamlite, "query", "SELECT count(*) FROM images", "--lake", str(tmp_path / "lake")]
    bench("query_s", bench.best_of(3, lambda: subprocess.run(question, check=True, capture_output=True)), 2.0)
