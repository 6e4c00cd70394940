"""The command line helps a stranger, answers questions while a run goes on, and starts nothing it does not need."""

import csv
import io
import json
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from dreamlite_data.lake import Lake
from flows.cli import app
from flows.run import Run
from flows.step import Step, StepFailed, StepResult

runner = CliRunner()
COMMANDS = ["refresh", "retrain", "evaluate", "export", "generate", "edit", "query", "report", "status", "serve", "plan", "explain"]


def invoke(*arguments: str):
    return runner.invoke(app, list(arguments))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_each_option(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    group = {item.name or item.callback.__name__: item for item in app.registered_commands}
    assert len(group[command].callback.__doc__) > 40
    assert "--lake" in result.output


def test_there_are_no_other_commands():
    assert {item.name or item.callback.__name__ for item in app.registered_commands} == set(COMMANDS)


def test_help_and_config_load_no_heavy_library():
    code = (
        "import sys; from typer.testing import CliRunner; from flows.cli import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
        "print([name for name in ('torch', 'prefect', 'transformers', 'ray', 'duckdb', 'pyarrow', 'diffusers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.fixture(scope="module")
def with_runs(lake_template, tmp_path_factory):
    """Root of a lake with one good run and one that failed; tests here only read it."""
    root = tmp_path_factory.mktemp("with_runs") / "lake"
    shutil.copytree(lake_template, root)
    with Lake(root) as lake:
        _two_runs(lake)
    return str(root)


def _two_runs(lake: Lake) -> None:
    steps = [Step("quality", lambda ctx: StepResult(metrics={"rows": 3.0}), ("dreamlite_data.schema",), about="Measure.")]
    Run(lake, "retrain", steps, preset="smoke", say=lambda line: None).run_all()

    def fail(ctx):
        raise ValueError("out of paper")

    with pytest.raises(StepFailed):
        Run(lake, "retrain", [*steps, Step("t2i", fail, ("dreamlite_data.schema",))], preset="smoke", say=lambda line: None).run_all()


def test_query_prints_tables_csv_and_json(with_runs):
    sql = "SELECT step, state, count(*) AS n FROM steps GROUP BY ALL ORDER BY step, state"
    rows = [
        {"step": "quality", "state": "done", "n": 1},
        {"step": "quality", "state": "skipped", "n": 1},
        {"step": "t2i", "state": "failed", "n": 1},
    ]
    assert json.loads(invoke("query", sql, "--lake", with_runs, "--format", "json").stdout) == rows
    text = invoke("query", sql, "--lake", with_runs, "--format", "csv").stdout
    assert "\r" not in text  # a shell's $(...) would keep it
    printed = list(csv.DictReader(io.StringIO(text)))
    assert printed == [{name: str(value) for name, value in row.items()} for row in rows]
    table = invoke("query", sql, "--lake", with_runs).stdout
    assert "skipped" in table and "step" in table.splitlines()[0]


@pytest.mark.parametrize(
    "sql", ["DELETE FROM steps", "DROP TABLE runs", "SELECT * FROM read_csv('/etc/passwd')", "SELECT nonsense FROM runs"]
)
def test_query_refuses_to_write_to_read_elsewhere_and_nonsense(with_runs, sql):
    result = invoke("query", sql, "--lake", with_runs)
    assert result.exit_code == 2 and "error:" in result.stderr
    assert json.loads(invoke("query", "SELECT count(*) AS n FROM steps", "--lake", with_runs, "-f", "json").stdout) == [{"n": 3}]


def test_query_of_an_unknown_format_or_lake_is_one_clear_line(with_runs, tmp_path):
    assert "'xml' is not table, csv or json" in invoke("query", "SELECT 1", "--lake", with_runs, "--format", "xml").stderr
    absent = invoke("query", "SELECT 1", "--lake", str(tmp_path / "nowhere"))
    assert absent.exit_code == 2 and "there is no lake at" in absent.stderr and not (tmp_path / "nowhere").exists()


def test_status_shows_runs_steps_and_the_error(with_runs):
    output = invoke("status", "--lake", with_runs).stdout
    assert "failed" in output and "done" in output and "ValueError: out of paper" in output


def test_status_calls_a_killed_run_crashed(lake):
    Run(lake, "retrain", [], preset="smoke")
    lake.append({"runs": [{"run_id": "retrain-dead", "flow": "retrain", "state": "running"}]})
    assert "crashed" in invoke("status", "--lake", str(lake.root)).stdout


def test_report_before_there_is_one_says_what_to_do(with_runs):
    result = invoke("report", "--lake", with_runs)
    assert result.exit_code == 2 and "dreamlite retrain" in result.stderr


def test_generate_without_a_checkpoint_says_what_to_do(with_runs):
    result = invoke("generate", "a red circle", "--lake", with_runs)
    assert result.exit_code == 2 and "train with `dreamlite retrain`" in result.stderr


@pytest.mark.parametrize(("command", "said"), [
    (("plan", "--until", "nope"), "no step 'nope': there are"), (("plan", "--flow", "foo"), "no flow 'foo'"),
    (("refresh", "--engine", "foo"), "no engine 'foo': there are prefect and inline"), (("evaluate", "--stage", "nope"), "no step 'evaluate_nope'"),
    (("report", "--run", "nope"), "no run 'nope'"),
])  # fmt: skip
def test_a_name_that_is_not_there_is_one_sentence(with_runs, command, said):
    result = invoke(*command, "--lake", with_runs)
    assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.stderr


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("refresh", "--preset", "smoke", "--lake", str(tmp_path / "file"))
    assert result.exit_code == 2 and str(tmp_path / "file") in result.stderr


def test_sampling_options_that_a_checkpoint_does_not_take_are_refused(with_runs, tmp_path):
    distilled, strange, text = tmp_path / "distilled", tmp_path / "strange", tmp_path / "no_image.png"
    for folder in (distilled, strange):
        folder.mkdir()
    (distilled / "dreamlite.json").write_text(json.dumps({"distilled_steps": 4}))
    text.write_text("no image")
    for options, said in (
        (["--steps", "8"], "distilled for 4 steps without guidance: leave out --steps"),
        (["--steps", "4", "--guidance-scale", "3"], "leave out --steps, --guidance-scale"),
        (["--steps", "0"], "greater than or equal to 1"),
    ):
        result = invoke("generate", "a red circle", "--lake", with_runs, "--checkpoint", str(distilled), *options)
        assert result.exit_code == 2 and said in " ".join(result.stderr.split()), result.stderr
    result = invoke("generate", "a red circle", "--lake", with_runs, "--checkpoint", str(strange))
    assert result.exit_code == 2 and "holds no dreamlite.json" in result.stderr and "--from" in result.stderr
    result = invoke("edit", str(text), "make it blue", "--lake", with_runs, "--checkpoint", str(distilled))
    assert result.exit_code == 2 and "cannot be read as an image" in result.stderr


def test_a_wrong_setting_is_refused_before_the_lake_is_touched(tmp_path):
    result = invoke("retrain", "--lake", str(tmp_path / "lake"), "--set", "train.t2i.stepz=1")
    assert result.exit_code == 2 and "did you mean 'train.t2i.steps'" in result.stderr
    assert not (tmp_path / "lake").exists()


TINY = """
import sys
from pathlib import Path
from flows import engine
from flows.step import Step, StepResult
engine.build_steps = lambda flow, config: [Step("quality", lambda ctx: StepResult(), ("dreamlite_data.schema",))]
engine.execute("retrain", "smoke", Path(sys.argv[1]), engine=sys.argv[2])
print("heavy:", [name for name in ("torch", "prefect", "ray") if name in sys.modules])
"""


def test_a_run_with_nothing_to_do_starts_neither_prefect_nor_ray(tmp_path):
    def run(engine: str) -> str:
        command = [sys.executable, "-c", TINY, str(tmp_path / "lake"), engine]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "done in" in run("inline")
    second = run("prefect")
    assert "nothing to do: all 1 steps of retrain are done" in second
    assert "heavy: []" in second
