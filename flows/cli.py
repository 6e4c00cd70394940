"""The command `dreamlite`: one verb per thing a person wants done.
Heavy libraries load inside the commands, so that help, query and status answer at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows import export_cli, finetune_cli, parts_cli, policy_cli, rewards_cli
from flows.console import DEFAULT_LAKE, LakeFolder, clear_errors, fail, open_lake, print_arrow, print_rows, say, warn

if TYPE_CHECKING:
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

app.add_typer(export_cli.app)  # verify, export-size
app.add_typer(policy_cli.app)  # policy, datasets, publish, forget
app.add_typer(rewards_cli.rewards, name="rewards")
app.add_typer(parts_cli.app, name="parts")
app.add_typer(finetune_cli.app)

Preset = Annotated[
    str,
    typer.Option(
        "--preset", "-p", help="Configuration to run: smoke (minutes), mini (default), mini-long (an hour), paper (0.39 B), or a .yaml file."
    ),
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
Steps = Annotated[int | None, typer.Option(min=1, help="Sampling steps. Default: 10; a distilled checkpoint has its own.")]
GuidanceScale = Annotated[float | None, typer.Option(help="Pull of the text. Default: 2. A distilled checkpoint takes none.")]
Seed = Annotated[int, typer.Option(help="Seed of the initial noise; the same seed gives the same image.")]


# -- the pipeline


@app.command()
def retrain(
    preset: Preset = "mini", lake: LakeFolder = DEFAULT_LAKE, set_: Set = None, until: Until = None, engine: Engine = None,
    from_: Annotated[str | None, typer.Option("--from", help="Start from a checkpoint: a folder in diffusers layout, or a hub id org/name@revision. The same as --set start.checkpoint=...")] = None,
) -> None:  # fmt: skip
    """Run the whole pipeline: data, six training stages, export, report. Does only what is not done yet."""
    start = [f"start.checkpoint={json.dumps(from_)}"] if from_ else []
    run = _execute("retrain", preset, lake, [*(set_ or []), *start], until, engine)
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
    print_rows([{"metric": name, "value": value} for name, value in record.metrics.items()], "table")


@app.command()
def export(preset: Preset = "mini", lake: LakeFolder = DEFAULT_LAKE, set_: Set = None, engine: Engine = None) -> None:
    """Make the on-device bundle (ONNX in float, half, int8 and int4, tokenizer, runner); earlier steps that are not done are done first."""
    run = _execute("retrain", preset, lake, set_, "export", engine)
    say(f"artifact: {run.records['export'].path('bundle')}")


@app.command()
def plan(
    preset: Preset = "mini", lake: LakeFolder = DEFAULT_LAKE, set_: Set = None, until: Until = None,
    flow: Annotated[str, typer.Option(help="retrain or refresh.")] = "retrain",
    gpu: Annotated[str | None, typer.Option(help="Say what training takes on this GPU: h100, a100, l40s, ... Default: h100 for the 0.39 B model.")] = None,
    gpus: Annotated[int, typer.Option(help="How many of them.")] = 8,
    mfu: Annotated[float, typer.Option(help="Share of their peak that training reaches; plan for half of the default too.")] = 0.28,
    images: Annotated[int | None, typer.Option(help="Images to train on, for the size of the caches.")] = None,
    edits: Annotated[int | None, typer.Option(help="Edit triplets to train on, for the size of the caches.")] = None,
) -> None:  # fmt: skip
    """Check the configuration and show what a run would do and why, and what it takes on GPUs. Computes nothing, needs no GPU."""
    with clear_errors():
        from flows.config import load_config
        from flows.engine import go_offline, look_ahead

        go_offline()
        planned, _ = look_ahead(flow, preset, lake, set_ or [], until)
        print_rows([{"step": item.step.name, "state": item.state, "why": item.why, "what": item.step.about} for item in planned], "table")
        config = load_config(preset, set_ or [])
        if flow != "retrain" or (gpu is None and config.model.preset != "official"):
            return
        from flows.compute_plan import compute_tables
        from trainers.compute import Cluster

        try:
            cluster = Cluster.of(gpu or "h100", gpus, mfu)
        except ValueError as error:
            fail(str(error), 2)
        for title, rows in compute_tables(config, cluster, images, edits, say).items():
            say(f"\n{title}")
            print_rows([{name: _plain(value) for name, value in row.items()} for row in rows], "table")


def _plain(value: Any) -> Any:
    """A number as people read it: three digits that count, thousands apart."""
    if not isinstance(value, (int, float)):
        return value
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3g}"


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
            fail(f"no step '{step}': there are {', '.join(item.step.name for item in plan_)}", 2)
        if planned.state != "to do":
            say(f"{step}: {planned.state}, {planned.why}")
            return
        sentence, changes = explain_parts(step, planned.parts, done)
        say(f"{step}: {sentence}")
        print_rows([{"part": name, "before": _brief(old), "now": _brief(new)} for name, old, new in changes], "table")


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
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
) -> None:  # fmt: skip
    """Paint images from text with a trained checkpoint."""
    with clear_errors():
        from flows.engine import go_offline

        go_offline()
        folder = _find_checkpoint(lake, checkpoint)
        from trainers.device import use_device
        from trainers.inference import generate_images

        given = _given(folder, steps=steps, guidance_scale=guidance_scale)
        _save(generate_images(folder, prompt, seed=seed, device=use_device(), **given), output, "generated")


@app.command()
def edit(
    image: Annotated[Path, typer.Argument(help="Image to edit.", exists=True, dir_okay=False)],
    instruction: Annotated[str, typer.Argument(help='What to change, e.g. "make the circle green".')],
    lake: LakeFolder = DEFAULT_LAKE, checkpoint: CheckpointName = None, seed: Seed = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the image.")] = Path("images"),
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    image_guidance_scale: Annotated[float | None, typer.Option(help="Pull of the source image. Default: 1. A distilled checkpoint takes none.")] = None,
) -> None:  # fmt: skip
    """Change an image as told with a trained checkpoint."""
    with clear_errors():
        from PIL import Image, UnidentifiedImageError

        from flows.engine import go_offline

        go_offline()
        folder = _find_checkpoint(lake, checkpoint)
        given = _given(folder, steps=steps, guidance_scale=guidance_scale, image_guidance_scale=image_guidance_scale)
        from trainers.device import use_device
        from trainers.inference import edit_images

        try:
            with Image.open(image) as opened:
                source = opened.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            fail(f"{image} cannot be read as an image ({error}): give a JPEG, PNG or WebP file", 2)
        _save(edit_images(folder, [source], [instruction], seed=seed, device=use_device(), **given), output, "edited")


def _given(checkpoint: Path, **options: Any) -> dict[str, Any]:
    """The sampling options that were given; an error where the checkpoint is none of ours or has steps of its own."""
    from trainers.model import load_facts

    try:
        distilled = load_facts(checkpoint).get("distilled_steps")
    except ValueError as error:
        fail(f"{error}; one of diffusers is drawn with by its own pipelines, and trained on with --from", 2)
    given = {name: value for name, value in options.items() if value is not None}
    if distilled and given not in ({}, {"steps": distilled}):
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        fail(f"{checkpoint} was distilled for {distilled} steps without guidance: leave out {named}", 2)
    return given


def _find_checkpoint(lake: Path, name: str | None) -> Path:
    """Folder of a checkpoint given by folder, id, or stage; the newest for None."""
    from dreamlite_data.lake import LakeError
    from flows.config import STAGES
    from flows.step import find_done

    if name and Path(name).is_dir():
        return Path(name)
    done = [record for record in find_done(open_lake(lake)) if record.step in STAGES and record.present()]
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
        fail(f"--format '{format_}' is not table, csv or json", 2)
    with clear_errors():
        import duckdb

        try:
            answer = open_lake(lake).query_read_only(sql)
        except duckdb.Error as error:
            fail(str(error), 2)
        print_arrow(answer, format_)


@app.command()
def status(lake: LakeFolder = DEFAULT_LAKE, runs: Annotated[int, typer.Option(help="How many of the newest runs.")] = 5) -> None:
    """Show the newest runs, the steps of the newest, and what is being computed now."""
    from flows.status import overview

    with clear_errors():
        view = overview(open_lake(lake), runs)
        print_rows(view.runs, "table")
        if view.steps:
            say(f"\nsteps of {view.runs[0]['run']}")
            print_rows(view.steps, "table")
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

            done = [record for record in find_done(open_lake(lake), "report") if record.present()]
            if not done:
                raise LakeError(f"no report in {lake} yet: run `dreamlite retrain`")
            say(str(done[0].path("report")))
            return
        from flows.report import write_report

        try:
            say(str(write_report(open_lake(lake), run, lake / "reports" / run)))
        except ValueError as error:
            fail(str(error), 2)


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
