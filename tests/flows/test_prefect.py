"""Prefect sees each step and its numbers, and losing Prefect loses nothing. One embedded server for all tests here."""

import asyncio
import os
import subprocess
import sys
import time
import warnings

import psutil
import pytest

from dreamlite_data.lake import Lake
from flows import engine, server
from flows.step import Step, StepFailed, StepResult

pytestmark = pytest.mark.slow

CODE = ("dreamlite_data.schema",)


@pytest.fixture(scope="module")
def prefect_server(tmp_path_factory):
    """The one Prefect server of the test session: a real one, as `dreamlite serve` starts it, so that it schedules too."""
    root = tmp_path_factory.mktemp("prefect")
    before = dict(os.environ)
    engine.embed_prefect(root)
    with server.prefect_server(root) as api:
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with temporary_settings({PREFECT_API_URL: api}):
            yield api
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def flow(monkeypatch):
    """Two tiny steps in place of the real DAG; `flow` holds what they should do and how often they ran."""
    state = {"value": 1, "fail": False, "ran": []}

    def first(ctx):
        state["ran"].append("quality")
        return StepResult(metrics={"rows": float(state["value"])})

    def second(ctx):
        state["ran"].append("t2i")
        if state["fail"]:
            raise ValueError("no room for weights")
        return StepResult(metrics={"loss": 0.25})

    def build(name, config):
        return [
            Step("quality", first, CODE, spec={"value": state["value"]}, about="Measure."),
            Step("t2i", second, CODE, spec={"value": state["value"], "fail": 0}, about="Train."),
        ]

    monkeypatch.setattr(engine, "build_steps", build)
    before = dict(os.environ)
    yield state
    os.environ.clear()
    os.environ.update(before)


def execute(root, lines=None, warned=None):
    return engine.execute(
        "retrain", "smoke", root, say=(lines if lines is not None else []).append, warn=(warned if warned is not None else []).append
    )


async def _seen():
    from prefect import get_client

    async with get_client() as client:
        flows = await client.read_flow_runs()
        tasks = await client.read_task_runs()
        artifacts = await client.read_artifacts()
    return flows, tasks, artifacts


def seen_by_prefect():
    """(flow runs newest first, task runs, artifacts) on the server."""
    flows, tasks, artifacts = asyncio.run(_seen())
    return sorted(flows, key=lambda run: run.created, reverse=True), tasks, artifacts


def test_each_step_is_a_task_run_with_its_numbers_as_artifacts(prefect_server, flow, tmp_path):
    run = execute(tmp_path / "lake")
    assert flow["ran"] == ["quality", "t2i"] and set(run.records) == {"quality", "t2i"}
    flows, tasks, artifacts = seen_by_prefect()
    assert flows[0].state_name == "Completed"
    mine = {task.name.rsplit("-", 1)[0]: task.state_name for task in tasks if task.flow_run_id == flows[0].id}
    assert mine == {"quality": "Materialized", "t2i": "Materialized"}
    assert {"quality-step", "quality-metrics", "t2i-step", "t2i-metrics"} <= {artifact.key for artifact in artifacts}


def test_a_step_that_is_done_shows_as_cached(prefect_server, flow, tmp_path):
    execute(tmp_path / "lake")
    flow["value"], flow["ran"] = 2, []
    run = engine.prepare("retrain", "smoke", tmp_path / "lake")
    run.run_all()  # brings both up to date, so the flow below has one done step and one lost one
    Lake(tmp_path / "lake").write(lambda connection: connection.execute("DELETE FROM steps WHERE step = 't2i'"))
    flow["ran"] = []
    execute(tmp_path / "lake")
    assert flow["ran"] == ["t2i"]
    flows, tasks, _ = seen_by_prefect()
    mine = {task.name.rsplit("-", 1)[0]: task.state_name for task in tasks if task.flow_run_id == flows[0].id}
    assert mine == {"quality": "Cached", "t2i": "Materialized"}


def test_a_failing_step_fails_the_flow_and_is_not_tried_again_without_prefect(prefect_server, flow, tmp_path):
    flow["fail"] = True
    with pytest.raises(StepFailed, match="no room for weights"):
        execute(tmp_path / "lake")
    assert flow["ran"] == ["quality", "t2i"]
    flows, _, _ = seen_by_prefect()
    assert flows[0].state_name == "Failed"


def test_an_artifact_that_cannot_be_stored_only_warns(prefect_server, flow, tmp_path, monkeypatch):
    from flows import deployments

    def refuse(**_):
        raise RuntimeError("no artifacts today")

    monkeypatch.setattr(deployments, "create_table_artifact", refuse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = execute(tmp_path / "lake")
    assert any("no artifacts today" in str(item.message) for item in caught)
    assert set(run.records) == {"quality", "t2i"}


def test_a_schedule_becomes_scheduled_runs(prefect_server):
    """Under SQLAlchemy 2.1 the scheduler of Prefect 3.8 raises in its loop and schedules nothing, without any other sign."""
    from prefect import get_client

    from flows.deployments import refresh

    async def scheduled() -> list[str]:
        deployment_id = await (await refresh.ato_deployment("test-nightly", cron="0 2 * * *")).aapply()
        end = time.monotonic() + 60
        async with get_client() as client:
            while True:
                runs = [run for run in await client.read_flow_runs() if run.deployment_id == deployment_id]
                if runs or time.monotonic() > end:
                    return [run.state_name for run in runs]
                await asyncio.sleep(0.5)

    states = asyncio.run(scheduled())
    assert states and set(states) == {"Scheduled"}


def test_a_second_server_on_the_same_port_is_refused_with_the_way_out(prefect_server, tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    port = int(prefect_server.split(":")[2].split("/")[0])
    with (
        pytest.raises(server.ServerError, match="already serves a Prefect API: set PREFECT_API_URL"),
        server.prefect_server(tmp_path, port),
    ):
        pass


def test_without_a_server_the_same_steps_run_inline_with_a_warning(flow, tmp_path, monkeypatch):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    warned = []
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        run = execute(tmp_path / "lake", warned=warned)
    assert len(warned) == 1 and "going on without it" in warned[0]
    assert flow["ran"] == ["quality", "t2i"] and set(run.records) == {"quality", "t2i"}


SERVE = """
import sys, time
from pathlib import Path
from flows.engine import embed_prefect
from flows.server import prefect_server
root = Path(sys.argv[1])
embed_prefect(root)
with prefect_server(root) as api:
    print(api, flush=True)
    time.sleep(300)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux's")
def test_a_killed_run_leaves_no_server_behind(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "PREFECT_HOME")}
    parent = subprocess.Popen([sys.executable, "-c", SERVE, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment)
    api = parent.stdout.readline().strip()
    children = psutil.Process(parent.pid).children()
    assert api.startswith("http://127.0.0.1:") and len(children) == 1
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
