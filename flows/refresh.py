"""The refresh DAG: frozen parts, sources, measurements, verdicts, curated dataset versions.
Each step is one function of the data package; here stands only what it reads, what its key holds and what it hands on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import trainers
from dreamlite_data.model_settings import ChatSettings
from dreamlite_data.settings import ExtraSource, RefreshSettings
from flows.config import PipelineConfig
from flows.key import digest, folder_digest, spec_of
from flows.start import START, join_parts, start_step
from flows.step import Edge, Step, StepContext, StepResult, step_id

MEASURES = {
    "quality": ("quality", "duplicates"),
    "caption": ("edit", "caption", "inspect"),
    "verify": ("verify_caption", "verify_edit", "contamination", "semantic"),
}
"""Which operators each measuring step runs."""

REWARDS = ("generate", "edit")

HEAD_BYTES = 65_536
"""How much of a table is read to see whether it names its images by URL."""

EDIT_FOLDERS = ("cutouts", "instructor", "editor", "reward")
"""Settings of edit routes that name folders: their content counts (see `edit_folders`), not where they lie."""

VIEWS = ("dreamlite_data.lake",)
"""Brings views.sql into a key: what a measurement or a policy reads is defined there."""


def refresh_steps(config: PipelineConfig) -> list[Step]:
    """components, sources, ingest, quality, caption, verify, score, curate, in that order."""
    settings, policy = config.refresh, config.refresh.policy
    code = ("dreamlite_data.refresh",)
    sources = {"scenes": spec_of(settings.scenes), "photos": spec_of(settings.photos)}
    edit_routes = {"composite": spec_of(settings.composite, EDIT_FOLDERS), "edit_model": spec_of(settings.edit_model, EDIT_FOLDERS)}
    if settings.edit_model.instructor is not None:
        edit_routes["instructor"] = _chat_spec(settings.edit_model.instructor)
    if settings.edit_sources != RefreshSettings().edit_sources:
        edit_routes["edit_sources"] = sorted(settings.edit_sources)
    extra = [spec_of(source) for source in settings.extra_sources]  # without the path: their content counts, see `external`
    fetches = any(source.kind in ("url_list", "jsonl", "parquet") for source in settings.extra_sources)
    downloads = {"downloads": spec_of(settings.downloads)} if fetches else {}
    return [
        *([start_step(config.start)] if config.start is not None else []),
        components_step(config),
        Step(
            "sources",
            _counts(lambda ctx: _data().write_sources(ctx.lake, settings, ctx.seed)),
            code,
            spec=sources,
            seed=config.seed,
            about="Write the small world as WebDataset shards and export the sample photos.",
        ),
        Step(
            "ingest",
            _counts(lambda ctx: _with_executor(settings, lambda executor: _data().ingest(ctx.lake, settings, executor))),
            code,
            spec={"ingest": spec_of(settings.ingest), "extra_sources": extra, **downloads},
            inputs=("sources",),
            external=lambda: {source.name: source_digest(source) for source in settings.extra_sources},
            alone=VIEWS,
            about="Read every source once, each bad record with its reason.",
        ),
        _measure_step(config, "quality", "ingest", {}, "Measure sharpness, contrast and near-duplicates."),
        _measure_step(
            config,
            "caption",
            "quality",
            {"min_side_px": policy.min_side_px, **edit_routes, **_model_specs(settings), **_steering(settings)},
            "Caption images, make edit triplets of photos, and measure with the models that the settings name.",
            external=lambda: {
                **edit_folders(settings), **{model: folder_digest(Path(model)) for model in _model_folders(settings)}
            },
        ),
        _measure_step(
            config,
            "verify",
            "caption",
            {
                "edit_pairs": spec_of(settings.edit_pairs),
                "benchmarks": [benchmark.name for benchmark in settings.benchmarks],
                "semantic": spec_of(settings.semantic),
                **({"judge": _chat_spec(settings.judge)} if settings.judge is not None else {}),
            },
            "Check captions and edits against the pixels, and everything against the benchmarks.",
            external=lambda: {
                **{benchmark.name: content_digest(benchmark.path) for benchmark in settings.benchmarks}, **_judge_folder(settings)
            },
        ),
        Step(
            "score",
            _counts(
                lambda ctx: _with_executor(settings, lambda executor: _data().score(ctx.lake, settings, executor, reward_folders(ctx)))
            ),
            (*code, "dreamlite_data.rewards"),
            spec={"require_scene_language": policy.require_scene_language, **_scoring_spec(settings)},
            inputs=("verify", "components:rewards"),
            external=lambda: {f"{scorer.kind} {' '.join(scorer.tasks)}": folder_digest(scorer.model) for scorer in settings.scoring.further},
            alone=VIEWS,
            about="Score every caption and edit that passed with the reward models.",
        ),
        Step(
            "curate",
            lambda ctx: _curate(ctx, config),
            code,
            spec={
                "policy": spec_of(policy), "benchmarks": [benchmark.name for benchmark in settings.benchmarks],
                **({"quotas": spec_of(settings.quotas, ("steer",))} if settings.quotas.cap else {}),
            },  # fmt: skip
            inputs=("score",),
            seed=config.seed,
            alone=VIEWS,
            about="Decide in SQL which rows are in, and freeze dataset versions.",
        ),
    ]


def edit_folders(settings: RefreshSettings) -> dict[str, str]:
    """{setting: digest} of the folders that edit routes read."""
    models = settings.edit_model
    named = {"cutouts": settings.composite.cutouts, "editor": models.editor, "reward": models.reward}
    if models.instructor is not None and Path(models.instructor.model).is_dir():
        named["instructor"] = Path(models.instructor.model)
    return {name: folder_digest(Path(path)) for name, path in sorted(named.items()) if path is not None}


def _model_specs(settings: RefreshSettings) -> dict[str, Any]:
    """What decides which models measure, for a key."""
    return {
        "captions": [spec_of(backend) for backend in settings.captions],
        "embed": spec_of(settings.embed),
        "safety": spec_of(settings.safety),
        "text": spec_of(settings.text),
    }


def _scoring_spec(settings: RefreshSettings) -> dict[str, Any]:
    """What decides which scores are made, for a key; nothing while it is as it always was. Folders count by content (`external`)."""
    scoring = settings.scoring
    further = {"further": [spec_of(scorer, ("model",)) for scorer in scoring.further]} if scoring.further else {}
    return further | ({"dtype": scoring.dtype} if scoring.dtype != "float32" else {})


def _steering(settings: RefreshSettings) -> dict[str, Any]:
    """The quotas at which the draws of edits aim, where they do."""
    return {"quotas": spec_of(settings.quotas, ("cap", "cap_rows"))} if settings.quotas.steer else {}


def _model_folders(settings: RefreshSettings) -> list[str]:
    """Models given as folders: their content counts, wherever they lie."""
    models = [backend.model for backend in settings.captions if backend.backend == "transformers"]
    return [model for model in (*models, settings.embed.model, settings.safety.watermark) if model is not None and Path(model).is_dir()]


def _chat_spec(chat: ChatSettings) -> dict[str, Any]:
    """What decides the answers of a chat model, for a key. Of one in a folder the content counts, not where it lies."""
    return spec_of(chat, ("model",) if Path(str(chat.model)).is_dir() else ())


def _judge_folder(settings: RefreshSettings) -> dict[str, str]:
    """The judge's weights where they lie in a folder."""
    judge = settings.judge
    return {"judge": folder_digest(Path(judge.model))} if judge is not None and Path(judge.model).is_dir() else {}


def _measure_step(
    config: PipelineConfig,
    name: str,
    before: str,
    spec: dict[str, Any],
    about: str,
    external: Callable[[], dict[str, Any]] | None = None,
) -> Step:
    settings, operators = config.refresh, MEASURES[name]
    return Step(
        name,
        _counts(lambda ctx: _with_executor(settings, lambda executor: _data().measure(ctx.lake, settings, executor, operators))),
        ("dreamlite_data.refresh",),
        spec={"operators": operators, **spec},
        inputs=(before,),
        external=external,
        alone=VIEWS,
        about=about,
    )


def _data() -> Any:
    from dreamlite_data import refresh

    return refresh


def _with_executor(settings: RefreshSettings, work: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Do `work` on the executor of the settings. Local processes end with the step; a Ray head serves the steps that follow."""
    from dreamlite_data import executors

    executor = executors.from_settings(settings)
    try:
        return work(executor)
    finally:
        if executor.name == "local":
            executor.close()


def _counts(work: Callable[[StepContext], dict[str, Any]]) -> Callable[[StepContext], StepResult]:
    """A step whose result is in the lake's tables; the numbers that `work` returns are its metrics."""

    def run(ctx: StepContext) -> StepResult:
        answer = work(ctx)
        numbers = {name: value for name, value in answer.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
        return StepResult(outputs={"answer": answer}, metrics=numbers, retries=answer.get("retries", 0))

    return run


def components_step(config: PipelineConfig) -> Step:
    """The frozen VAE, text encoder, tokenizer and reward models, packaged, given or trained here."""
    settings = config.components
    # The packaged parts' folder by path: importing trainers.components.build would load torch to make a plan.
    given = Path(trainers.__file__).parent / "components" / "small_world" if settings.source == "packaged" else Path(settings.source)

    def run(ctx: StepContext) -> StepResult:
        from trainers.components.build import FOLDERS, build_components

        folder = Path(build_components(settings, ctx.directory, ("rewards/generate", "rewards/edit") if config.start else FOLDERS))
        if config.start is not None:
            folder = join_parts(ctx.inputs[START].path("checkpoint"), folder, ctx.directory / "joined")
        outputs: dict[str, Any] = {"components": folder} if folder.is_relative_to(ctx.directory) else {"components_path": str(folder)}
        digests = {part.name: folder_digest(part) for part in sorted(folder.iterdir()) if part.is_dir()}
        # Two consumers, two items: retraining a reward must re-score, but must not re-train the VAE's readers.
        frozen = {name: value for name, value in digests.items() if name != "rewards"}
        return StepResult(
            outputs, digests={"rewards": digests["rewards"], "model": hashlib.sha256(repr(sorted(frozen.items())).encode()).hexdigest()}
        )

    trained = settings.source == "train"
    return Step(
        "components",
        run,
        # Parts that are only copied are known by their content; neither the code nor the settings that once trained them matter.
        ("trainers.components.build",) if trained else (),
        spec=spec_of(settings) if trained else {"source": settings.source},
        inputs=(f"{START}:parts",) if config.start is not None else (),
        external=None if trained else lambda: {"source": folder_digest(given)},
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
    from dreamlite_data.faults import fault_report

    versions = _data().curate(ctx.lake, config.refresh, ctx.seed)
    # How the filters did on the faults planted in the small world, for the report; without such rows there is nothing to grade.
    faults = fault_report(ctx.lake, config.refresh) if config.refresh.scenes.t2i_rows + config.refresh.scenes.edit_rows else []
    edges = [Edge("dataset", f"{item['name']}@{item['version']}", "step", step_id("curate", ctx.key), "made_by") for item in versions]
    return StepResult(
        outputs={
            "faults": faults,
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


def content_digest(path: Path) -> str:
    """Digest of a file's content, or of a folder as `folder_digest` takes it."""
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    return folder_digest(path)


def source_digest(source: ExtraSource) -> str:
    """What a source of the user's own holds now, so far as can be said without reading it: the content of its files and mapping, or of
    a hub dataset the commit that its revision stands for. Where URLs are fetched, a failure may have passed by tomorrow: then each
    day looks again, which asks only what is pending."""
    if source.kind in ("folder", "webdataset") and source.mapping is None:
        return folder_digest(source.path)
    from dreamlite_data.sources.extra import hub_commit, identity

    parts = [identity(source)]
    if source.path.is_file():
        parts.append(content_digest(source.path))
    elif source.kind == "huggingface" and not source.path.exists():
        parts.append(hub_commit(source))
    else:
        parts.append(folder_digest(source.path))
    if source.image_root is not None:
        parts.append(folder_digest(source.image_root))
    if source.kind == "url_list" or (source.kind == "jsonl" and _names_urls(source.path)):
        parts.append(datetime.now(UTC).date().isoformat())
    return digest(parts)


def _names_urls(table: Path) -> bool:
    """Whether the beginning of a table of images has an address of the web in it. One in a caption costs a look a day, no more."""
    files = [table] if table.is_file() else sorted(path for path in table.glob("*") if path.is_file())[:1]
    for path in files:
        with path.open("rb") as stream:
            if re.search(rb"https?://", stream.read(HEAD_BYTES)):
                return True
    return False
