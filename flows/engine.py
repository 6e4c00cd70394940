"""How a command becomes a run: config, plan, then Prefect around the same steps, or the steps alone.
Prefect mirrors; the lake is the truth. No server, or a server that dies, never costs a result."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from dreamlite_data.lake import Lake
from dreamlite_data.policies.decided import decided
from flows.config import ConfigError, EngineName, PipelineConfig, load_config
from flows.gates import GateFailed
from flows.key import SourceTree
from flows.run import Planned, Run, make_plan
from flows.server import prefect_server
from flows.step import Step, StepFailed, StepRecord, find_done

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}
"""No download and no report home unless the user's environment says otherwise."""


def go_offline() -> None:
    """Set the offline switches that the user has not set."""
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)


def embed_prefect(lake_root: Path) -> None:
    """Settings of Prefect and its server here, to be in the environment before Prefect is imported. A user's own settings win."""
    os.environ.setdefault("PREFECT_HOME", str(lake_root.resolve() / "prefect"))
    os.environ.setdefault("PREFECT_RESULTS_PERSIST_BY_DEFAULT", "false")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "ERROR")


def build_steps(flow: str, config: PipelineConfig) -> list[Step]:
    """The DAG of a flow, in order."""
    if flow == "refresh":
        from flows.refresh import refresh_steps

        return refresh_steps(config)
    if flow == "retrain":
        from flows.retrain import retrain_steps

        return retrain_steps(config)
    if flow == "finetune":
        from flows.finetune import finetune_steps

        return finetune_steps(config)
    raise ConfigError(f"no flow '{flow}': there are refresh, retrain and finetune")


def with_decisions(steps: Sequence[Step], lake: Lake) -> list[Step]:
    """The steps, with what people decided about the lake in the key of `curate`: policies that they committed, images that they
    had forgotten. Where nobody decided anything the key is as without."""
    return [dataclasses.replace(step, external=lambda: decided(lake)) if step.name == "curate" else step for step in steps]


def until_step(steps: Sequence[Step], until: str | None) -> list[Step]:
    """The steps that `until` needs, itself included, in order; all of them for None."""
    if until is None:
        return list(steps)
    by_name = {step.name: step for step in steps}
    if until not in by_name:
        raise ConfigError(f"no step '{until}': there are {', '.join(by_name)}")
    needed, pending = set(), [until]
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending += by_name[name].parents
    return [step for step in steps if step.name in needed]


def prepare(
    flow: str,
    preset: str,
    lake_root: Path,
    overrides: Sequence[str] = (),
    until: str | None = None,
    say: Callable[[str], None] = print,
) -> Run:
    """Check the config, open the lake and lay out the run. Computes nothing."""
    config = load_config(preset, overrides)
    chosen = until_step(build_steps(flow, config), until)
    lake = Lake(lake_root)
    steps = with_decisions(chosen, lake)
    names = {step.name for step in steps}
    return Run(
        lake,
        flow,
        steps,
        preset=config.preset,
        config=config.model_dump(mode="json"),
        gates=[gate for gate in config.gates if {gate.after, gate.compared_to} - {None} <= names],
        say=say,
    )


def look_ahead(
    flow: str, preset: str, lake_root: Path, overrides: Sequence[str] = (), until: str | None = None
) -> tuple[list[Planned], list[StepRecord]]:
    """(plan, finished steps) of a flow, without writing anything: a lake that is not there yet stays so."""
    steps = until_step(build_steps(flow, load_config(preset, overrides)), until)
    if not (lake_root / "catalog.sqlite").exists():
        return make_plan(steps, [], SourceTree()), []
    with Lake(lake_root, read_only=True) as lake:
        done = find_done(lake)
        return make_plan(with_decisions(steps, lake), done, SourceTree()), done


def execute(
    flow: str,
    preset: str,
    lake_root: Path,
    overrides: Sequence[str] = (),
    until: str | None = None,
    engine: str | None = None,
    say: Callable[[str], None] = print,
    warn: Callable[[str], None] = print,
) -> Run:
    """Bring a flow up to date. Starts neither Prefect nor Ray when every step is done.

    Raises ConfigError, StepFailed or GateFailed; everything finished until then stays finished.
    """
    go_offline()
    if engine not in (None, *get_args(EngineName)):
        raise ConfigError(f"no engine '{engine}': there are {' and '.join(get_args(EngineName))}")
    run = prepare(flow, preset, lake_root, overrides, until, say)
    plan = run.plan()
    if all(planned.state == "done" for planned in plan):
        run.take_done(plan)
        say(f"nothing to do: all {len(plan)} steps of {flow} are done")
        return run
    say(describe_plan(plan))
    if any(planned.step.name == "export" and planned.state != "done" for planned in plan):
        _require_targets(run.config["export"]["targets"])
    if (engine or run.config["exec"]["engine"]) == "prefect":
        try:
            return under_prefect(flow, preset, lake_root, overrides, until, say)
        except (StepFailed, GateFailed, KeyboardInterrupt):
            raise
        except Exception as error:  # whatever kills a server or its client: the work itself needs neither
            warn(f"Prefect failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); going on without it")
            run = prepare(flow, preset, lake_root, overrides, until, say)
    run.run_all()
    return run


def _require_targets(targets: Sequence[str]) -> None:
    """The export would itself refuse a target whose extra is missing, but after hours of training."""
    from trainers.export.target_checks import require_targets

    try:
        require_targets(targets)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def under_prefect(flow: str, preset: str, lake_root: Path, overrides: Sequence[str], until: str | None, say: Callable[[str], None]) -> Run:
    """Run the flow as a Prefect flow run with one task run per step."""
    embed_prefect(lake_root)
    with prefect_server(lake_root.resolve()) as api:
        from flows import deployments

        say(f"Prefect: {api.removesuffix('/api')} (its UI, while this run goes on)")
        body = {"refresh": deployments.refresh, "retrain": deployments.retrain}[flow]
        with deployments.keep_run(say) as kept:
            body(preset=preset, lake=str(lake_root), overrides=list(overrides), until=until)
        deployments.flush_events()
    return kept[0]


def describe_plan(plan: Sequence[Planned]) -> str:
    """One line: how much is done and what comes."""
    todo = [planned.step.name for planned in plan if planned.state != "done"]
    return f"{len(plan) - len(todo)} of {len(plan)} steps are done; to do: {', '.join(todo)}"
