"""The refresh DAG: frozen parts, sources, measurements, verdicts, curated dataset versions.
Each step is one function of the data package; here stands only what it reads, what its key holds and what it hands on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.config import PipelineConfig
from flows.key import spec_of
from flows.step import Edge, Step, StepContext, StepResult, step_id

MEASURES = {
    "quality": ("quality", "duplicates"),
    "caption": ("edit", "caption"),
    "verify": ("verify_caption", "verify_edit"),
}
"""Which operators each measuring step runs."""

REWARDS = ("generate", "edit")


def refresh_steps(config: PipelineConfig) -> list[Step]:
    """components, sources, ingest, quality, caption, verify, score, curate, in that order."""
    settings = config.refresh
    sources = {"scenes": spec_of(settings.scenes), "photos": spec_of(settings.photos)}
    measured = {"ingest": spec_of(settings.ingest), "sources": sources}
    steps = [
        components_step(config),
        Step(
            "sources", _counts(lambda ctx: _data().write_sources(ctx.lake, settings, ctx.seed)), ("dreamlite_data.refresh",),
            spec=sources, seed=config.seed, about="Write the small world as WebDataset shards and export the sample photos.",
        ),
        Step(
            "ingest", _counts(lambda ctx: _data().ingest(ctx.lake, settings, _executor(config))), ("dreamlite_data.refresh",),
            spec=measured, inputs=("sources",), external=lambda: {source.name: folder_digest(source.path) for source in settings.extra_sources},
            about="Read every source once, each bad record with its reason.",
        ),
    ]  # fmt: skip
    before = "ingest"
    abouts = {
        "quality": "Measure sharpness, contrast and near-duplicates.",
        "caption": "Caption images and make edit triplets.",
        "verify": "Check captions and edits against the pixels.",
    }
    for name, operators in MEASURES.items():
        steps.append(Step(
            name, _counts(lambda ctx, names=operators: _data().measure(ctx.lake, settings, _executor(config), list(names))),
            ("dreamlite_data.refresh",), spec={"operators": list(operators)}, inputs=(before,), about=abouts[name],
        ))  # fmt: skip
        before = name
    steps.append(Step(
        "score", _counts(lambda ctx: _data().score(ctx.lake, settings, _executor(config), reward_folders(ctx))),
        ("dreamlite_data.refresh", "dreamlite_data.rewards"), inputs=("verify", "components:rewards"),
        about="Score every image and edit with the reward models.",
    ))  # fmt: skip
    steps.append(Step(
        "curate", lambda ctx: _curate(ctx, config), ("dreamlite_data.refresh",), spec={"policy": spec_of(settings.policy)},
        inputs=("score",), seed=config.seed, about="Decide in SQL which rows are in, and freeze dataset versions.",
    ))  # fmt: skip
    return steps


def _data() -> Any:
    from dreamlite_data import refresh

    return refresh


def _executor(config: PipelineConfig) -> Any:
    from dreamlite_data import executors

    return executors.from_settings(config.refresh)


def _counts(work: Callable[[StepContext], dict[str, Any]]) -> Callable[[StepContext], StepResult]:
    """A step whose result is in the lake's tables; the numbers that `work` returns are its metrics."""

    def run(ctx: StepContext) -> StepResult:
        answer = work(ctx) or {}
        numbers = {name: value for name, value in answer.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
        return StepResult(outputs={"answer": {name: str(value) if isinstance(value, Path) else value for name, value in answer.items()}},
                          metrics=numbers)  # fmt: skip

    return run


def components_step(config: PipelineConfig) -> Step:
    """The frozen VAE, text encoder, tokenizer and reward models, packaged, given or trained here."""
    settings = config.components
    given = settings.source not in ("packaged", "train")

    def run(ctx: StepContext) -> StepResult:
        from trainers.stages import build_components

        folder = Path(build_components(settings, ctx.directory))
        outputs: dict[str, Any] = {"components": folder} if folder.is_relative_to(ctx.directory) else {"components_path": str(folder)}
        digests = {part.name: folder_digest(part) for part in sorted(folder.iterdir()) if part.is_dir()}
        # Two consumers, two items: retraining a reward must re-score, but must not re-train the VAE's readers.
        frozen = {name: value for name, value in digests.items() if name != "rewards"}
        return StepResult(
            outputs, digests={"rewards": digests["rewards"], "model": hashlib.sha256(repr(sorted(frozen.items())).encode()).hexdigest()}
        )

    return Step(
        "components",
        run,
        ("trainers.components",),
        spec=spec_of(settings),
        alone=("trainers.stages",),
        seed=config.seed,
        external=(lambda: {"source": folder_digest(Path(settings.source))}) if given else None,
        about="Provide the frozen VAE, text encoder and reward models.",
    )


def components_folder(ctx: StepContext) -> Path:
    """Folder with vae/ text_encoder/ tokenizer/ processor/ scheduler/ rewards/ of this run."""
    record = ctx.inputs["components"]
    return Path(record.outputs["components_path"]) if "components_path" in record.outputs else record.path("components")


def reward_folders(ctx: StepContext) -> dict[str, Path]:
    """{task: folder of its reward model}."""
    return {task: components_folder(ctx) / "rewards" / task for task in REWARDS}


def _curate(ctx: StepContext, config: PipelineConfig) -> StepResult:
    versions = _data().curate(ctx.lake, config.refresh, ctx.seed)
    edges = [Edge("dataset", f"{item['name']}@{item['version']}", "step", step_id("curate", ctx.key), "made_by") for item in versions]
    return StepResult(
        outputs={
            "datasets": {item["name"]: {"version": item["version"], "rows": item["rows"], "digest": item["digest"]} for item in versions}
        },
        metrics={f"{item['name']}_rows": float(item["rows"]) for item in versions},
        digests={item["name"]: item["digest"] for item in versions},
        lineage=edges,
    )


def dataset_versions(ctx: StepContext, names: tuple[str, ...]) -> dict[str, int]:
    """{name: version} of the curated datasets that this run trains on."""
    datasets = ctx.inputs["curate"].outputs["datasets"]
    return {name: datasets[name]["version"] for name in names}


def folder_digest(folder: Path) -> str:
    """sha256 over names and bytes of a folder up to 256 MB; beyond that over names, sizes and modification times.

    A source of terabytes must be planned in seconds; a checkpoint folder must be known by its content alone.
    """
    if not folder.is_dir():
        return "absent"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [path.stat() for path in files]
    by_content = sum(stat.st_size for stat in stats) <= 256 * 1024**2
    total = hashlib.sha256(b"content" if by_content else b"listing")
    for path, stat in zip(files, stats, strict=True):
        total.update(str(path.relative_to(folder)).encode() + b"\0")
        if by_content:
            with path.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            total.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return total.hexdigest()
