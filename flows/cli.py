"""The command `dreamlite`: one verb per thing a person wants done.
Heavy libraries load inside the commands, so that help, query and status answer at once."""

from __future__ import annotations

import csv
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows import policy_cli

if TYPE_CHECKING:
    import pyarrow as pa

    from dreamlite_data.lake import Lake
    from flows.run import Run

app = typer.Typer(
    name="dreamlite",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    help="From raw images to a quantized on-device model that generates and edits images.\n\n"
    "Start with [bold]dreamlite retrain[/bold]: on a laptop without GPU or network it builds the data, trains every stage of the small "
    "world, exports the model and writes a report. Run it again and it does only what changed.",
)

app.add_typer(policy_cli.app)  # policy, datasets, publish, forget

Preset = Annotated[
    str, typer.Option("--preset", "-p", help="Configuration to run: smoke (minutes), mini (default), paper (0.39 B), or a .yaml file.")
]
LakeFolder = Annotated[
    Path, typer.Option("--lake", "-l", envvar="DREAMLITE_LAKE", help="Folder of the lake: all data, runs, checkpoints and reports.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Override one setting, e.g. --set train.t2i.steps=200. May be repeated.")
]
Until = Annotated[str | None, typer.Option("--until", help="Stop after this step; only what it needs is done.")]
Engine = Annotated[
    str | None, typer.Option("--engine", help="prefect: tracked in its UI too. inline: in this process only. Default: exec.engine.")
]
CheckpointName = Annotated[
    str | None, typer.Option("--checkpoint", "-c", help="A checkpoint id, a stage (its newest), or a folder. Default: the newest.")
]
Seed = Annotated[int, typer.Option(help="Seed of the initial noise; the same seed gives the same image.")]
DEFAULT_LAKE = Path("lake")


def say(text: str) -> None:
    typer.echo(text)


def warn(text: str) -> None:
    typer.secho(f"warning: {text}", fg=typer.colors.YELLOW, err=True)


@contextmanager
def clear_errors() -> Iterator[None]:
    """What a user can mend is shown as its sentence, with exit code 2 (asked wrongly) or 1 (failed); the rest as a traceback."""
    from dreamlite_data.lake import LakeError
    from flows.config import ConfigError
    from flows.gates import GateFailed
    from flows.server import ServerError
    from flows.step import StepFailed

    try:
        yield
    except (ConfigError, LakeError, ServerError) as error:
        _fail(str(error), 2)
    except GateFailed as error:
        _fail(str(error), 1)
    except StepFailed as error:
        if os.environ.get("DREAMLITE_TRACEBACK"):
            traceback.print_exception(error.__cause__)
        _fail(f"{error}\nIts files are in {error.directory}. Run the same command again to go on from there; "
              "DREAMLITE_TRACEBACK=1 shows where in the code it happened.", 1)  # fmt: skip
    except KeyboardInterrupt:
        _fail("stopped; finished steps are kept, run the same command again to go on", 130)


def _fail(text: str, code: int) -> None:
    typer.secho(f"error: {text}", fg=typer.colors.RED, err=True)
    raise typer.Exit(code)


def _open(lake: Path) -> Lake:
    from dreamlite_data.lake import Lake

    return Lake(lake, read_only=True)


# -- the pipeline


@app.command()
def retrain(preset: Preset = "mini", lake: LakeFolder = DEFAULT_LAKE, set_: Set = None, until: Until = None, engine: Engine = None) -> None:
    """Run the whole pipeline: data, six training stages, export, report. Does only what is not done yet."""
    run = _execute("retrain", preset, lake, set_, until, engine)
    if "export" in run.records:
        say(f"artifact: {run.records['export'].path('bundle')}")
    if "report" in run.records:
        say(f"report:   {run.records['report'].path('report')}")


@app.command()
def refresh(preset: Preset = "mini", lake: LakeFolder = DEFAULT_LAKE, set_: Set = None, until: Until = None, engine: Engine = None) -> None:
    """Bring the curated datasets up to date: read sources, measure what is new, decide, freeze new versions."""
    run = _execute("refresh", preset, lake, set_, until, engine)
    if "curate" in run.records:
        for name, item in run.records["curate"].outputs["datasets"].items():
            say(f"dataset {name}@{item['version']}: {item['rows']:,} rows")


@app.command()
def evaluate(
    preset: Preset = "mini", lake: LakeFolder = DEFAULT_LAKE, set_: Set = None, engine: Engine = None,
    stage: Annotated[str, typer.Option(help="Stage to judge: t2i, edit, joint, sft, refl, dmd2, or export.")] = "export",
) -> None:  # fmt: skip
    """Judge one stage on held-out prompts and edits; earlier steps that are not done are done first."""
    run = _execute("retrain", preset, lake, set_, f"evaluate_{stage}", engine)
    record = run.records[f"evaluate_{stage}"]
    _print_rows([{"metric": name, "value": value} for name, value in record.metrics.items()], "table")


@app.command()
def export(preset: Preset = "mini", lake: LakeFolder = DEFAULT_LAKE, set_: Set = None, engine: Engine = None) -> None:
    """Make the on-device bundle (ONNX in float and int8, tokenizer, runner); earlier steps that are not done are done first."""
    run = _execute("retrain", preset, lake, set_, "export", engine)
    say(f"artifact: {run.records['export'].path('bundle')}")


@app.command()
def plan(
    preset: Preset = "mini", lake: LakeFolder = DEFAULT_LAKE, set_: Set = None, until: Until = None,
    flow: Annotated[str, typer.Option(help="retrain or refresh.")] = "retrain",
) -> None:  # fmt: skip
    """Check the configuration and show what a run would do and why. Computes nothing, needs no GPU."""
    with clear_errors():
        from flows.engine import look_ahead

        planned, _ = look_ahead(flow, preset, lake, set_ or [], until)
        _print_rows([{"step": item.step.name, "state": item.state, "why": item.why, "what": item.step.about} for item in planned], "table")


@app.command()
def explain(
    step: Annotated[str, typer.Argument(help="Name of a step, as in `dreamlite plan`.")],
    preset: Preset = "mini", lake: LakeFolder = DEFAULT_LAKE, set_: Set = None,
) -> None:  # fmt: skip
    """Say why a step would run again: which setting, input or source file differs from its nearest earlier result."""
    with clear_errors():
        from flows.engine import look_ahead
        from flows.run import explain as explain_parts

        plan_, done = look_ahead("retrain", preset, lake, set_ or [])
        planned = next((item for item in plan_ if item.step.name == step), None)
        if planned is None:
            _fail(f"no step '{step}': there are {', '.join(item.step.name for item in plan_)}", 2)
        if planned.state != "to do":
            say(f"{step}: {planned.state}, {planned.why}")
            return
        sentence, changes = explain_parts(step, planned.parts, done)
        say(f"{step}: {sentence}")
        _print_rows([{"part": name, "before": _brief(old), "now": _brief(new)} for name, old, new in changes], "table")


def _brief(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _execute(flow: str, preset: str, lake: Path, overrides: list[str] | None, until: str | None, engine: str | None) -> Run:
    from flows.engine import execute

    with clear_errors():
        return execute(flow, preset, lake, overrides or [], until, engine, say, warn)


# -- using a trained model


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Argument(help="What to paint, e.g. \"a red circle left of a blue square\". One image per prompt.")],
    lake: LakeFolder = DEFAULT_LAKE, checkpoint: CheckpointName = None, seed: Seed = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the images.")] = Path("images"),
    steps: Annotated[int | None, typer.Option(help="Sampling steps. Default: the checkpoint's own.")] = None,
) -> None:  # fmt: skip
    """Paint images from text with a trained checkpoint."""
    with clear_errors():
        from flows.engine import go_offline

        go_offline()
        folder = _find_checkpoint(lake, checkpoint)
        from trainers.stages import generate_images

        _save(generate_images(folder, prompt, seed=seed, **_given(steps=steps)), output, "generated")


@app.command()
def edit(
    image: Annotated[Path, typer.Argument(help="Image to edit.", exists=True, dir_okay=False)],
    instruction: Annotated[str, typer.Argument(help='What to change, e.g. "make the circle green".')],
    lake: LakeFolder = DEFAULT_LAKE, checkpoint: CheckpointName = None, seed: Seed = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the image.")] = Path("images"),
    steps: Annotated[int | None, typer.Option(help="Sampling steps. Default: the checkpoint's own.")] = None,
) -> None:  # fmt: skip
    """Change an image as told with a trained checkpoint."""
    with clear_errors():
        from PIL import Image

        from flows.engine import go_offline

        go_offline()
        folder = _find_checkpoint(lake, checkpoint)
        from trainers.stages import edit_images

        with Image.open(image) as opened:
            source = opened.convert("RGB")
        _save(edit_images(folder, [source], [instruction], seed=seed, **_given(steps=steps)), output, "edited")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _find_checkpoint(lake: Path, name: str | None) -> Path:
    """Folder of a checkpoint given by folder, id, or stage; the newest for None."""
    from dreamlite_data.lake import LakeError
    from flows.config import STAGES
    from flows.step import find_done

    if name and Path(name).is_dir():
        return Path(name)
    done = [record for record in find_done(_open(lake)) if record.step in STAGES and record.present()]
    newest = done if name is None else [record for record in done if name in (record.step, record.id)]
    if not newest:
        known = ", ".join(dict.fromkeys(record.id for record in done)) or "none yet; train with `dreamlite retrain`"
        raise LakeError(f"no checkpoint {name or ''} in {lake}: there are {known}".replace("  ", " "))
    return newest[0].path("checkpoint")


def _save(images: list[Any], folder: Path, stem: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        at = folder / f"{stem}_{number:03d}.png"
        image.save(at)
        say(str(at))


# -- looking


@app.command()
def query(
    sql: Annotated[str, typer.Argument(help='One SELECT over the lake, e.g. "SELECT * FROM funnel". DESCRIBE and SHOW TABLES work too.')],
    lake: LakeFolder = DEFAULT_LAKE,
    format_: Annotated[str, typer.Option("--format", "-f", help="table, csv or json.")] = "table",
) -> None:
    """Ask the lake in SQL, read-only, also while a run is going on."""
    if format_ not in ("table", "csv", "json"):
        _fail(f"--format '{format_}' is not table, csv or json", 2)
    with clear_errors():
        import duckdb

        try:
            answer = _open(lake).query_read_only(sql)
        except duckdb.Error as error:
            _fail(str(error), 2)
        _print_arrow(answer, format_)


def _print_arrow(answer: pa.Table, format_: str) -> None:
    if format_ == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(answer.column_names)
        writer.writerows([_cell(row[name]) for name in answer.column_names] for row in answer.to_pylist())
    else:
        _print_rows(answer.to_pylist(), format_, answer.column_names)


def _cell(value: Any) -> Any:
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else "" if value is None else value


def _print_rows(rows: list[dict[str, Any]], format_: str, names: list[str] | None = None) -> None:
    if format_ == "json":
        json.dump(rows, sys.stdout, indent=1, default=lambda value: _cell(value) if isinstance(value, bytes) else str(value))
        sys.stdout.write("\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names or (list(rows[0]) if rows else []):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(_cell(value)) for value in row.values()))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table, markup=False)


@app.command()
def status(lake: LakeFolder = DEFAULT_LAKE, runs: Annotated[int, typer.Option(help="How many of the newest runs.")] = 5) -> None:
    """Show the newest runs, the steps of the newest, and what is being computed now."""
    from flows.status import overview

    with clear_errors():
        view = overview(_open(lake), runs)
        _print_rows(view.runs, "table")
        if view.steps:
            say(f"\nsteps of {view.runs[0]['run']}")
            _print_rows(view.steps, "table")
        for line in view.now:
            say(line)


@app.command()
def report(
    lake: LakeFolder = DEFAULT_LAKE,
    run: Annotated[str | None, typer.Option(help="A run id. Default: the newest run with a report.")] = None,
) -> None:
    """Print where the report of a run is; with --run, write that run's report anew."""
    with clear_errors():
        if run is None:
            from dreamlite_data.lake import LakeError
            from flows.step import find_done

            done = [record for record in find_done(_open(lake), "report") if record.present()]
            if not done:
                raise LakeError(f"no report in {lake} yet: run `dreamlite retrain`")
            say(str(done[0].path("report")))
            return
        from flows.report import write_report

        say(str(write_report(_open(lake), run, lake / "reports" / run)))


@app.command()
def serve(
    preset: Preset = "mini", lake: LakeFolder = DEFAULT_LAKE, set_: Set = None,
    nightly: Annotated[str, typer.Option(help="Cron of the nightly refresh.")] = "0 2 * * *",
    weekly: Annotated[str, typer.Option(help="Cron of the weekly retrain.")] = "0 4 * * 6",
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1 of the Prefect server and its UI, where PREFECT_API_URL is not set.")] = 4200,
) -> None:  # fmt: skip
    """Keep this machine refreshing nightly and retraining weekly, until stopped (Prefect deployments; UI on its server)."""
    with clear_errors():
        from flows.config import load_config
        from flows.engine import embed_prefect, go_offline

        load_config(preset, set_ or [])
        go_offline()
        embed_prefect(lake)
        from flows.server import prefect_server

        with prefect_server(lake.resolve(), port) as api:
            from flows.deployments import serve_schedules

            say(f"serving refresh-nightly ({nightly}) and retrain-weekly ({weekly}); UI: {api.removesuffix('/api')}; stop with Ctrl-C")
            serve_schedules(preset, lake, set_ or [], nightly, weekly)


if __name__ == "__main__":
    app()
