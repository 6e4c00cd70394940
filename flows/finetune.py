"""Fine-tuning as a DAG: a user's images through the lake, an adapter on a given checkpoint, pictures before and after.
The steps are those of a whole run where they are the same; what a few hand-picked rows need besides stands here."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

from flows.config import ConfigError, PipelineConfig
from flows.key import spec_of
from flows.refresh import refresh_steps
from flows.retrain import train_step, training_rows
from flows.start import START
from flows.step import Step, StepContext, StepResult

RULES = {
    "ingested": "could not be read",
    "unique_image": "show what another does",
    "unique_triplet": "show what another does",
    "large_enough": "are smaller than {min_side_px} px, the side that is trained at (a smaller one: --size)",
    "has_caption": "have no caption",
    "something_changed": "have a target that equals its source",
}
"""What the rules that can put out a hand-picked row say of it."""


def finetune_steps(config: PipelineConfig) -> list[Step]:
    """start, the data steps without scoring, the one stage that is trained, pictures."""
    if config.start is None or len(config.stages) != 1:
        raise ConfigError("finetune trains one stage from a given checkpoint: set start.checkpoint and leave one stage of train that is not null")
    stage = config.stages[0]
    if getattr(config.train, stage).lora is None:
        raise ConfigError(f"finetune trains an adapter: train.{stage}.lora is null; leave it out, or say its rank")
    steps = [step for step in refresh_steps(config) if step.name != "score"]  # nothing here is chosen by its reward
    curate = next(step for step in steps if step.name == "curate")

    def curated(ctx: StepContext) -> StepResult:
        result = curate.run(ctx)
        require_rows(ctx, config, stage)
        return result

    steps[steps.index(curate)] = dataclasses.replace(curate, inputs=("verify",), run=curated)
    return [*steps, train_step(config, stage, START), pictures_step(config, stage)]


def require_rows(ctx: StepContext, config: PipelineConfig, stage: str) -> None:
    """Say how many rows are trained on and why others are not. Raises ValueError where none is left, or a batch asks for a task without."""
    for name in getattr(config.train, stage).datasets:
        rules = ctx.lake.query("SELECT rule, rows_in, rejected FROM funnel WHERE dataset = ? ORDER BY position", [name]).to_pylist()
        total = rules[0]["rows_in"] if rules else 0
        lost = [(rule["rejected"], _reason(rule["rule"], config)) for rule in rules if rule["rejected"]]
        kept, why = total - sum(count for count, _ in lost), ", ".join(f"{count} {reason}" for count, reason in lost)
        if not total:
            kind = "captioned image" if name == "t2i" else "triplet"
            raise ValueError(f"the data holds no {kind}: look at its layout, or name it with --kind and --mapping")
        if not kept:
            raise ValueError(f"of {total} rows of the data none can be trained on: {why}")
        ctx.say(f"{kept} of {total} rows are trained on" + (f"; {why}" if why else ""))


def _reason(rule: str, config: PipelineConfig) -> str:
    return RULES.get(rule, f"fell to the rule {rule}").format(min_side_px=config.refresh.policy.min_side_px)


def pictures_step(config: PipelineConfig, stage: str) -> Step:
    """Draw the training prompts with the checkpoint as it came and as it is now."""
    settings, names = config.evaluate, getattr(config.train, stage).datasets

    def run(ctx: StepContext) -> StepResult:
        from PIL import Image

        from trainers.before_after import draw_before_after
        from trainers.device import use_device
        from trainers.parallel import use_threads

        device = use_device(config.exec.device)
        use_threads(config.exec.threads, device)
        pictures: dict[str, Path] = {}
        metrics: dict[str, float] = {}
        rows = training_rows(ctx, names, settings.prompts)
        for task in dict.fromkeys(row["task"] for row in rows):
            chosen = [row for row in rows if row["task"] == task]
            sources = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in chosen] if task == "edit" else None
            pictures[task] = ctx.directory / f"before_after_{task}.png"
            before, after = ctx.inputs[START].path("checkpoint"), ctx.inputs[stage].path("checkpoint")
            metrics[f"{task}/pixel_difference"] = draw_before_after(
                before, after, [row["text"] for row in chosen], sources, settings, pictures[task], device
            )
        return StepResult(dict(pictures), metrics=metrics)

    return Step(
        "pictures",
        run,
        ("trainers.before_after",),
        spec=spec_of(settings),
        inputs=(f"{START}:checkpoint", f"{stage}:checkpoint", *(f"curate:{name}" for name in names)),
        about="Draw training prompts before and after.",
    )
