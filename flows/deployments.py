"""The two flows as Prefect sees them: what a deployment, a schedule or the command line starts.
A thin skin: one task run per step with Prefect's cache and retries off, one artifact per step, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from prefect import Task, flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from flows.engine import go_offline, prepare
from flows.run import Run
from flows.step import Step, StepRecord

_said: ContextVar[tuple[Callable[[str], None], list[Run]] | None] = ContextVar("said", default=None)


@contextmanager
def keep_run(say: Callable[[str], None]) -> Iterator[list[Run]]:
    """While open, a flow started in this process speaks through `say` and leaves its Run in the list."""
    kept: list[Run] = []
    token = _said.set((say, kept))
    try:
        yield kept
    finally:
        _said.reset(token)


@flow(name="refresh", retries=0, validate_parameters=True)
def refresh(preset: str = "mini", lake: str = "lake", overrides: list[str] | None = None, until: str | None = None) -> str:
    """Sources to curated dataset versions; returns the run id."""
    return _run("refresh", preset, lake, overrides, until)


@flow(name="retrain", retries=0, validate_parameters=True)
def retrain(preset: str = "mini", lake: str = "lake", overrides: list[str] | None = None, until: str | None = None) -> str:
    """Sources to a quantized on-device model and a report; returns the run id."""
    return _run("retrain", preset, lake, overrides, until)


def _run(name: str, preset: str, lake: str, overrides: list[str] | None, until: str | None) -> str:
    go_offline()
    say, kept = _said.get() or (print, [])
    run = prepare(name, preset, Path(lake), overrides or [], until, say)
    kept.append(run)
    run.run_all(lambda step: _as_task(run, step))
    return run.run_id


def _as_task(run: Run, step: Step) -> None:
    """One step as a task run, whose state name tells a skipped step (Cached) from a computed one (Materialized)."""
    failure: list[BaseException] = []

    def body():  # noqa: ANN202 - a Prefect State; the record stays in `run`, Prefect stores no data of ours
        try:
            run.do(step)
        except BaseException as error:
            failure.append(error)
            raise
        name = "Materialized" if step.name in run.computed else "Cached"
        return Completed(name=name, message=run.records[step.name].id)

    body.__doc__ = step.about
    task = Task(body, name=step.name, description=step.about, cache_policy=NO_CACHE, retries=0, persist_result=False, log_prints=False)
    trouble = ""
    try:
        trouble = str(task(return_state=True).message)
    except Exception as error:
        trouble = str(error)
    if not failure and step.name not in run.records:
        raise RuntimeError(f"Prefect did not run step '{step.name}': {trouble}")
    if not failure and step.name in run.records and trouble != run.records[step.name].id:
        warnings.warn(f"Prefect lost the task run of '{step.name}', the step itself is done: {trouble}", stacklevel=2)
    if failure:
        raise failure[0]
    _show(step, run.records[step.name])


def _show(step: Step, record: StepRecord) -> None:
    """A table of the step's numbers and a note of its files in Prefect's UI; failing to show only warns."""
    key = step.name.replace("_", "-")
    try:
        if record.metrics:
            create_table_artifact(
                key=f"{key}-metrics",
                table=[{"metric": name, "value": value} for name, value in record.metrics.items()],
                description=f"{step.about} ({record.id})",
            )
        files = "\n".join(f"- {name}: `{record.directory / path}`" for name, path in record.outputs.get("paths", {}).items())
        create_markdown_artifact(
            key=f"{key}-step",
            markdown=f"# {step.name}\n\n{step.about}\n\n`{record.id}`, {record.seconds:.1f} s\n\n{files}",
        )
    except Exception as error:
        warnings.warn(f"no Prefect artifact for step '{step.name}': {error}", stacklevel=2)


def flush_events() -> None:
    """Hand the last task-run states to the server before it stops; what is lost is lost to the mirror only."""
    from prefect.events.worker import EventsWorker

    try:
        EventsWorker.drain_all(timeout=10)
    except Exception as error:
        warnings.warn(f"Prefect's last events were not stored: {error}", stacklevel=2)


def serve_schedules(preset: str, lake: Path, overrides: list[str], nightly: str, weekly: str) -> None:
    """Serve refresh-nightly and retrain-weekly from this process until it is stopped.

    One run of each at a time; a run that comes due meanwhile is cancelled, for the next one will find the same work.
    """
    from prefect import serve
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import EntrypointType

    parameters = {"preset": preset, "lake": str(lake.resolve()), "overrides": overrides}
    module = EntrypointType.MODULE_PATH  # found wherever the process was started
    one = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    serve(
        refresh.to_deployment("refresh-nightly", cron=nightly, parameters=parameters, concurrency_limit=one, entrypoint_type=module),
        retrain.to_deployment("retrain-weekly", cron=weekly, parameters=parameters, concurrency_limit=one, entrypoint_type=module),
    )
