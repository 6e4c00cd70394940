"""The whole DAG: refresh, the training stages each with its evaluation, export, and the report.
Which stage reads which checkpoint and which datasets is written here once; gates and skipping are `flows.run`'s."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.config import PipelineConfig
from flows.key import folder_digest, spec_of
from flows.refresh import components_folder, dataset_versions, refresh_steps
from flows.start import START
from flows.step import Edge, Step, StepContext, StepResult, step_id

if TYPE_CHECKING:
    from trainers.grading import Evaluation

RECIPES = {"t2i": "supervised", "edit": "supervised", "joint": "supervised", "sft": "supervised", "refl": "refl", "dmd2": "dmd2"}
"""Module in trainers.recipes behind each stage: a change in dmd2.py must not retrain t2i."""

DISTILLED = "dmd2"
"""The stage whose few-step student is exported."""

HELDOUT = ("t2i", "edit")
"""Datasets whose held-out split every stage is judged on."""

LOOP = ("trainers.loop", "trainers.data", "trainers.model", "trainers.conditioning")
"""What every stage trains with."""

DISPATCH = ("trainers.stages",)
"""Imports every recipe; its own text counts for a stage, the recipes that the stage does not use do not."""


def retrain_steps(config: PipelineConfig) -> list[Step]:
    """refresh, then S and evaluate_S for every stage S that is trained, then export, evaluate_export, report.

    Each stage starts from the last one before it; without dmd2 there is no student to export.
    """
    steps = refresh_steps(config)
    parent = START if config.start is not None else None
    for stage in config.stages:
        steps += [train_step(config, stage, parent), evaluate_step(config, stage, parent if stage == DISTILLED else None)]
        parent = stage
    if DISTILLED in config.stages:
        steps += [export_step(config), evaluate_export_step(config)]
    return [*steps, report_step(steps)]


def train_step(config: PipelineConfig, stage: str, parent: str | None) -> Step:
    """Train one stage from the checkpoint of `parent`."""
    settings = getattr(config.train, stage)
    rewarded = stage == "refl"

    def run(ctx: StepContext) -> StepResult:
        from trainers.launch import StageRequest, train

        versions = dataset_versions(ctx, settings.datasets)
        request = StageRequest(
            stage=stage, settings=settings, model=config.model, components=components_folder(ctx),
            parent=ctx.inputs[parent].path("checkpoint") if parent else None, lake=ctx.lake.root, datasets=versions,
            output=ctx.directory, seed=ctx.seed, threads=config.exec.threads, execution=config.exec.train,
            device=config.exec.device,
        )  # fmt: skip
        metrics = train(request, ctx.lake)
        checkpoint, adapter, own_id = ctx.directory / "checkpoint", ctx.directory / "adapter", step_id(stage, ctx.key)
        weights = folder_digest(checkpoint)
        parent_id = ctx.inputs[parent].id if parent else None
        edges = [Edge("checkpoint", own_id, "dataset", f"{name}@{version}", "trained_on") for name, version in versions.items()]
        edges.append(Edge("checkpoint", own_id, "components", ctx.inputs["components"].id, "frozen_parts"))
        edges.append(Edge("checkpoint", own_id, "step", own_id, "made_by"))
        if parent_id:
            edges.append(Edge("checkpoint", own_id, "checkpoint", parent_id, "started_from"))
        return StepResult(
            outputs={"checkpoint": checkpoint, "checkpoint_id": own_id} | ({"adapter": adapter} if settings.lora else {}),
            metrics={name: value for name, value in (metrics or {}).items() if isinstance(value, (int, float))},
            digests={"checkpoint": weights},
            lineage=edges,
            rows={
                "checkpoints": [
                    {
                        "checkpoint_id": own_id,
                        "stage": stage,
                        "path": str(checkpoint),
                        "step": settings.steps,
                        "parent_id": parent_id,
                        "dataset": ",".join(versions),  # one row a checkpoint; the lineage has an edge to each dataset
                        "dataset_version": ",".join(str(version) for version in versions.values()),
                        "digest": weights,
                    }
                ],
                "metrics": read_metrics(ctx.directory / "metrics.jsonl"),
            },
        )  # fmt: skip

    return Step(
        stage, run, (f"trainers.recipes.{RECIPES[stage]}", *LOOP, *(["dreamlite_data.rewards"] if rewarded else [])), alone=DISPATCH,
        spec={"recipe": spec_of(settings), "model": model_spec(config)}, seed=config.seed,
        external=(lambda: {task: folder_digest(scorer.model) for task, scorer in settings.second_scorers.items()}) if rewarded else None,
        inputs=("components:model", *(["components:rewards"] if rewarded else []), *([f"{parent}:checkpoint"] if parent else []),
                *(f"curate:{name}" for name in settings.datasets)),
        about=f"Train stage '{stage}'" + (f" from the checkpoint of '{parent}'." if parent else " from scratch."),
    )  # fmt: skip


def model_spec(config: PipelineConfig) -> dict[str, Any]:
    """What decides the network, for a key: with a checkpoint to start from only what is said beside it, for the rest is the checkpoint's."""
    return spec_of(config.model) if config.start is None else spec_of(config.model.model_dump(include=config.model.model_fields_set))


def evaluate_step(config: PipelineConfig, stage: str, teacher: str | None = None) -> Step:
    """Judge one stage's checkpoint on held-out rows, a distilled one beside its teacher in as few steps."""

    def run(ctx: StepContext) -> StepResult:
        from trainers.device import use_device
        from trainers.evaluate import evaluate_checkpoint
        from trainers.parallel import use_threads

        device = use_device(config.exec.device)
        use_threads(config.exec.threads, device)
        judged = evaluate_checkpoint(
            ctx.inputs[stage].path("checkpoint"), config.judging, components=components_folder(ctx), lake=ctx.lake,
            datasets=dataset_versions(ctx, HELDOUT), output=ctx.directory,
            teacher=ctx.inputs[teacher].path("checkpoint") if teacher else None, device=device,
        )  # fmt: skip
        files = {path.stem: path for path in sorted(ctx.directory.glob("*")) if path.suffix in (".png", ".json")}
        return StepResult(files, metrics=as_metrics(judged.scores), rows=eval_rows(stage, judged))

    return Step(
        f"evaluate_{stage}",
        run,
        ("trainers.evaluate", "trainers.inference", "trainers.data", "dreamlite_data.rewards"),
        spec=spec_of(config.judging),
        seed=config.seed,
        inputs=("components", f"{stage}:checkpoint", *([f"{teacher}:checkpoint"] if teacher else []), *(f"curate:{name}" for name in HELDOUT)),
        about=f"Judge the checkpoint of '{stage}' on held-out prompts and edits.",
    )


def export_step(config: PipelineConfig) -> Step:
    """Turn the distilled checkpoint into the on-device bundle."""
    stage, settings = DISTILLED, config.export

    def run(ctx: StepContext) -> StepResult:
        from trainers.export.bundle import export_bundle

        lineage = {
            "checkpoint": ctx.inputs[stage].id,
            "step": step_id("export", ctx.key),
            "datasets": {name: f"{name}@{version}" for name, version in dataset_versions(ctx, HELDOUT).items()},
            "calibration_sql": " ".join(TRAINING_SQL.split()),
        }
        answer = export_bundle(
            ctx.inputs[stage].path("checkpoint"),
            settings,
            ctx.directory,
            calibration=training_rows(ctx, HELDOUT, 2 * settings.calibration_rows),
            lineage=lineage,
        )
        artifact_id = answer["artifact_id"]
        return StepResult(
            outputs={"bundle": Path(answer["bundle"]), "artifact_id": artifact_id, "numbers": {k: v for k, v in answer.items() if k != "bundle"}},
            metrics={
                "megabytes": answer["bytes"] / 1e6,
                **{f"{name}_megabytes": size / 1e6 for name, size in answer["sizes"].items()},
                **{f"{name}/size_share": size / answer["variants"]["fp32"] for name, size in answer["variants"].items()},
                **{f"{name.rpartition('_')[2]}/{name.rpartition('_')[0]}/latent_psnr_db": value["psnr_db"]
                   for name, value in answer["parity"]["end_to_end"].items()},
            },
            digests={"bundle": answer["digest"]},
            lineage=[Edge("artifact", artifact_id, "checkpoint", ctx.inputs[stage].id, "exported_from"),
                     Edge("artifact", artifact_id, "step", step_id("export", ctx.key), "made_by")],
            rows={"artifacts": [{
                "artifact_id": artifact_id, "kind": "bundle", "path": answer["bundle"], "bytes": answer["bytes"], "digest": answer["digest"],
                "metrics_json": json.dumps({k: v for k, v in answer.items() if k not in ("bundle", "artifact_id", "digest", "bytes")}),
            }]},
        )  # fmt: skip

    return Step(
        "export",
        run,
        ("trainers.export.bundle",),
        spec=spec_of(settings),
        seed=config.seed,
        inputs=(f"{stage}:checkpoint", *(f"curate:{name}" for name in HELDOUT)),
        about="Export ONNX graphs, quantize, and prove that they compute what torch computes.",
    )


TRAINING_SQL = """
SELECT row_id, task, text, source_image_id
FROM (
    SELECT *, row_number() OVER (PARTITION BY task, coalesce(edit_type, '') ORDER BY md5(row_id || $seed)) AS turn
    FROM dataset_rows WHERE name = $name AND version = $version AND split = 'train'
)
ORDER BY turn, md5(row_id || $seed) LIMIT $rows
"""
"""Every kind of edit in turn, rows of a kind in an order that the seed draws; the same rows on every machine."""


def training_rows(ctx: StepContext, names: tuple[str, ...], count: int) -> list[dict[str, Any]]:
    """`count` training rows of each dataset as {id, task, text, image (bytes of an edit's source)}, drawn by SQL: never held-out ones."""
    from dreamlite_data.dataset import read_images

    rows: list[dict[str, Any]] = []
    for name, version in dataset_versions(ctx, names).items():
        wanted = {"name": name, "version": version, "seed": str(ctx.seed), "rows": count}
        drawn = ctx.lake.query(TRAINING_SQL, wanted).to_pylist()
        images = read_images(ctx.lake, [row["source_image_id"] for row in drawn])
        rows += [
            {"id": f"{name}@{version}/{row['row_id']}", "task": row["task"], "text": row["text"], "image": images.get(row["source_image_id"])}
            for row in drawn
        ]
    return rows


def evaluate_export_step(config: PipelineConfig) -> Step:
    """Judge the artifact itself, in every variant, with the runner that ships in it."""
    variants = config.export.variants

    def run(ctx: StepContext) -> StepResult:
        from trainers.export.evaluate import evaluate_bundle

        metrics: dict[str, float] = {}
        rows: dict[str, list[dict[str, Any]]] = {"evals": [], "eval_answers": []}
        for variant in variants:
            judged = evaluate_bundle(ctx.inputs["export"].path("bundle"), config.export, variant, ctx.seed, output=ctx.directory)
            metrics |= {f"{variant}/{name}": value for name, value in as_metrics(judged.scores).items()}
            metrics |= kept_shares(metrics, variant)
            for table, own in eval_rows(f"export_{variant}", judged).items():
                rows[table] += own
        return StepResult(metrics=metrics, rows=rows)

    return Step(
        "evaluate_export",
        run,
        ("trainers.export.evaluate",),
        spec=spec_of(config.export),
        seed=config.seed,
        inputs=("export:bundle",),
        about="Judge the exported bundle as a phone would run it, in float and in every smaller variant.",
    )


def kept_shares(metrics: dict[str, float], variant: str) -> dict[str, float]:
    """'<variant>/<task>/exact_kept': exact matches as a share of the fp32 student's, where that has any."""
    shares = {}
    for task in ("generate", "edit"):
        float_exact = metrics.get(f"fp32/{task}/{task}_exact", 0.0)
        if float_exact > 0 and f"{variant}/{task}/{task}_exact" in metrics:
            shares[f"{variant}/{task}/exact_kept"] = metrics[f"{variant}/{task}/{task}_exact"] / float_exact
    return shares


def report_step(before: list[Step]) -> Step:
    """One HTML page about everything before it."""

    def run(ctx: StepContext) -> StepResult:
        from flows.report import write_report

        return StepResult({"report": Path(write_report(ctx.lake, ctx.run_id, ctx.directory))})

    return Step("report", run, ("flows.report",), inputs=tuple(step.name for step in before), about="Write the report of this run.")


def eval_rows(stage: str, judged: Evaluation) -> dict[str, list[dict[str, Any]]]:
    """What an evaluation of `stage` adds to the lake, by table."""
    return {table: [{**row, "stage": stage} for row in rows] for table, rows in (("evals", judged.scores), ("eval_answers", judged.answers))}


def as_metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    """[{task, metric, value, n}] -> {'task/metric': value}."""
    return {f"{row['task']}/{row['metric']}": float(row["value"]) for row in rows}


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The curves a stage wrote line by line; of a position that was written twice (resume) the last counts."""
    found: dict[tuple[str, float], dict[str, Any]] = {}
    if file.is_file():
        for line in file.read_text().splitlines():
            try:
                item = json.loads(line)
            except ValueError:
                continue  # a line cut off by kill -9; training wrote it again on resume
            found[item["name"], item["position"]] = {key: item[key] for key in ("name", "position", "value")}
    return list(found.values())
