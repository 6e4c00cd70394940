"""The steps of a data refresh, from sources to dataset versions. Each is a plain function that does only what is pending.
Orchestrators call these; nothing here knows of one."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dreamlite_data import downloads, sources
from dreamlite_data.checks import check_measurement, judgement_steps
from dreamlite_data.comparisons import COMPARISONS
from dreamlite_data.cutout_licences import record_cutouts
from dreamlite_data.executors import Executor, from_settings
from dreamlite_data.inspection import INSPECTIONS, inspect, require_installed
from dreamlite_data.lake import Lake
from dreamlite_data.listing import Listing
from dreamlite_data.operators.base import op_version
from dreamlite_data.operators.caption import Caption
from dreamlite_data.operators.commits import Commits, delete_records
from dreamlite_data.operators.edit_routes import ROUTES, forget_unused_routes, route_measurement
from dreamlite_data.operators.ingest import Ingest, IngestTask, ingest_task
from dreamlite_data.operators.quality import Quality
from dreamlite_data.operators.run import (
    Measurement,
    make_current,
    measure_pending,
    passing_failures,
    withdraw_passing_failures,
)
from dreamlite_data.operators.score import REWARD, TASKS, Score, weights_digest
from dreamlite_data.policies.curate import curate as run_policies
from dreamlite_data.progress import Progress
from dreamlite_data.settings import PhotosSettings, RefreshSettings, ScenesSettings
from dreamlite_data.sources import photos, scenes
from dreamlite_data.sources.base import Unit
from dreamlite_data.sources.digests import file_digests
from dreamlite_data.steering import plan_edits
from dreamlite_data.taxonomy import record_taxonomy

__all__ = ["GROUPS", "MEASURES", "curate", "funnel", "ingest", "measure", "score", "source_list", "write_sources"]

MEASURES = ("quality", "duplicates", "edit", "caption", *INSPECTIONS, "verify_caption", "verify_edit", "contamination", "semantic")
"""Every measurement but scoring, in the order in which each finds its inputs ready."""
RETRIED = {"edit": "op_edit", "describe": "op_describe", "verify_edit": "op_edit_question"}
"""Tables of calls that may fail for a passing reason, by the measurement that makes them."""
GROUPS = {
    "quality": ("quality", "duplicates"),
    "inspect": INSPECTIONS,
    "verify": ("verify_caption", "verify_edit", "contamination", "semantic"),
}


# --- sources ---------------------------------------------------------------------------------------------------------


def _digest8(settings: ScenesSettings | PhotosSettings) -> str:
    return hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:8]


def _folder(lake: Lake) -> Path:
    return lake.files / "sources"


def _world(settings: ScenesSettings, seed: int) -> str:
    return f"{_digest8(settings)}_s{seed}"


def write_sources(lake: Lake, settings: RefreshSettings, seed: int) -> dict[str, Any]:
    """Write the small world as WebDataset shards and export the photos. What stands complete already is not written again.
    The truth about planted faults goes to `<world>.truth.json` beside the shards' folder."""
    require_installed(settings)  # the first step of a refresh: nothing is computed for a run that cannot end
    with lake.exclusive("refresh"):
        answer: dict[str, Any] = {"shards": 0, "planted_faults": 0, "photos": 0}
        if settings.scenes.t2i_rows or settings.scenes.edit_rows:
            world = _folder(lake) / f"scenes_{_world(settings.scenes, seed)}"
            truth_file = world.with_suffix(".truth.json")
            if not truth_file.exists():
                _write_world(world, truth_file, settings, seed)
            answer |= {"scenes": str(world), "shards": len(list(world.rglob("*.tar")))}
            answer["planted_faults"] = len(json.loads(truth_file.read_text()))
        if settings.photos.enabled:
            folder = _folder(lake) / _photo_source(settings)
            if not folder.exists():
                draft = folder.with_name(f"{folder.name}.tmp")
                shutil.rmtree(draft, ignore_errors=True)
                photos.export(draft, settings.photos.max_px)
                draft.rename(folder)
            answer |= {"photos_folder": str(folder)}
            answer["photos"] = sum(file.suffix not in (".txt", ".json") for file in folder.iterdir())
        return answer


def _photo_source(settings: RefreshSettings) -> str:
    return f"photos_{settings.photos.max_px}"


def _write_world(world: Path, truth_file: Path, settings: RefreshSettings, seed: int) -> None:
    tasks = scenes.plan(settings.scenes, seed, world)
    truth = []
    executor = from_settings(settings)
    try:
        with Progress("write scenes", total=settings.scenes.t2i_rows + settings.scenes.edit_rows, unit="rows") as bar:
            for task, planted in zip(tasks, executor.map(scenes.write_shard, tasks), strict=True):
                part = "t2i" if task.task == "generate" else "edit"
                truth += [{"source": f"{world.name}_{part}", **row} for row in planted]
                bar.advance(task.stop - task.start)
    finally:
        if executor.name == "local":
            executor.close()
    draft = truth_file.with_suffix(".tmp")
    draft.write_text(json.dumps(truth))
    draft.replace(truth_file)  # written last: it says that the shards are complete


def source_list(lake: Lake, settings: RefreshSettings, seed: int | None = None) -> list[sources.Source]:
    """The sources that these settings name; without `seed`, the small worlds of every seed that were written."""
    found: list[sources.Source] = []
    if settings.scenes.t2i_rows or settings.scenes.edit_rows:
        pattern = f"scenes_{_world(settings.scenes, seed)}" if seed is not None else f"scenes_{_digest8(settings.scenes)}_s*"
        for truth_file in sorted(_folder(lake).glob(f"{pattern}.truth.json")):
            world = truth_file.name.removesuffix(".truth.json")
            for part in ("t2i", "edit"):
                found.append(sources.WebDatasetSource(f"{world}_{part}", _folder(lake) / world / part, "scenes"))
    if settings.photos.enabled:
        found.append(sources.FolderSource(_photo_source(settings), _folder(lake) / _photo_source(settings), "photos"))
    found += [sources.extra_source(extra, downloads.outcomes(lake)) for extra in settings.extra_sources]
    return found


# --- ingest ----------------------------------------------------------------------------------------------------------


def ingest(lake: Lake, settings: RefreshSettings, executor: Executor) -> dict[str, Any]:
    """Read every unit (shard or file) that is new or changed. A unit that is gone from its source is withdrawn: its records
    leave the current state, earlier snapshots keep them. Returns counts of units, records, failed and quarantined."""
    require_installed(settings)
    with lake.exclusive("refresh"):
        lake.clean()
        operator = Ingest(settings.ingest)
        version = op_version(operator)
        digests = file_digests(lake.files)
        listed = source_list(lake, settings)
        fetched = downloads.fetch(lake, listed, settings.downloads)
        names = [source.name for source in listed]
        own = {source.name for source in settings.extra_sources}
        with Listing(lake, (_as_told(unit) if unit.source in own else unit for source in listed for unit in source.units(digests))) as units:
            digests.save()
            gone = units.gone(names)
            if gone:
                lake.write(lambda connection: delete_records(connection, gone))
            fresh, replacing = units.pending(version)
            answer: dict[str, Any] = {"units": units.count, "pending": len(fresh), "withdrawn": len(gone), "records": 0, "failed": 0, **fetched}
            if len(fresh):
                tasks = _ingest_tasks(zip(units.at(fresh), replacing, strict=True), settings, version, str(lake.staging))
                given: collections.deque[IngestTask] = collections.deque()  # not `tee`, which lets go of what both have passed only 57 at a time
                with Progress("ingest", total=len(fresh), unit="units") as bar, Commits(lake) as commits:
                    for written in executor.map(ingest_task, _noted(tasks, given), operator.resources):
                        task = given.popleft()
                        commits.add(written, task.replaces)
                        answer["records"] += written.rows
                        answer["failed"] += written.failed
                        bar.advance(len(task.units), records=answer["records"], failed=answer["failed"])
        make_current(lake, operator.name, version, operator.config())
        answer["quarantined"] = lake.query(
            "SELECT count(*) AS n FROM op_shard WHERE error IS NOT NULL AND list_contains($names, source)", {"names": names}
        )["n"][0].as_py()
        return answer


def _as_told(unit: Unit) -> Unit:
    """A unit of a user's source, known by its licence and origin as well: where they are corrected it is read again, and every row
    then carries what holds now."""
    if unit.licence is None and unit.origin is None:
        return unit
    told = json.dumps([unit.digest, unit.licence, unit.origin])
    return dataclasses.replace(unit, digest=hashlib.sha256(told.encode()).hexdigest())


def _noted(tasks: Iterable[IngestTask], given: collections.deque[IngestTask]) -> Iterator[IngestTask]:
    """The tasks, each put into `given` as it is taken."""
    for task in tasks:
        given.append(task)
        yield task


def _ingest_tasks(units: Iterable[tuple[Unit, bool]], settings: RefreshSettings, version: str, staging: str) -> Iterator[IngestTask]:
    """A shard is a task; files of one folder are grouped, for a commit per file would take longer than the file. Beside each unit
    stands whether the lake has read it before."""
    limits = settings.ingest
    group: list[tuple[Unit, bool]] = []
    filled = 0

    def task() -> IngestTask:
        replaces = tuple((unit.source, unit.shard) for unit, known in group if known)
        return IngestTask(tuple(unit for unit, _ in group), limits, version, staging, replaces)

    for unit, known in units:
        alike = group and unit.grouped and group[-1][0].grouped and group[-1][0].source == unit.source
        if group and not (alike and len(group) < limits.folder_files_per_task and filled + unit.size_bytes <= limits.folder_mb_per_task * 2**20):
            yield task()
            group, filled = [], 0
        group.append((unit, known))
        filled += unit.size_bytes
    if group:
        yield task()


# --- measure ---------------------------------------------------------------------------------------------------------


def measure(lake: Lake, settings: RefreshSettings, executor: Executor, names: Sequence[str]) -> dict[str, Any]:
    """Run the named measurements (of MEASURES, or the groups of GROUPS) over what they have not seen.
    `edit` makes new images, so the measures of an image follow it at once; `verify_edit` is followed by the triplets that
    verified ones give rise to, and by the rules of each edit type. Returns rows and failures of each, why where one is off, and
    `retries` where calls of a model failed for a passing reason: the next time makes them again."""
    require_installed(settings)
    wanted: list[str] = []
    for name in names:
        if name not in (*MEASURES, *GROUPS):
            raise ValueError(f"there is no measurement {name!r}; there are {', '.join((*MEASURES, *GROUPS))}")
        wanted += [part for part in GROUPS.get(name, (name,)) if part not in wanted]
    answer: dict[str, Any] = {}
    with lake.exclusive("refresh"):
        for name in wanted:
            for step in _steps_of(lake, settings, name):
                counts = _measure_one(lake, settings, executor, step)
                for key, value in counts.items():
                    answer[f"{step}_{key}"] = value if isinstance(value, str) else answer.get(f"{step}_{key}", 0) + value
        if retries := passing_failures(lake, (RETRIED[name] for name in wanted if name in RETRIED)):
            answer["retries"] = retries
    return answer


def _steps_of(lake: Lake, settings: RefreshSettings, name: str) -> tuple[str, ...]:
    if name not in ("edit", "verify_edit"):
        return (name,)
    record_taxonomy(lake)
    active = forget_unused_routes(lake, settings)
    if name == "edit":
        if "edit_composite" in active:
            digests = file_digests(lake.files)
            record_cutouts(lake, settings.composite, digests)
            digests.save()
        plan = ("edit_plan",) if settings.quotas.steer else ()
        return (*plan, *(route for route in active if route != "edit_pairs"), "quality", "duplicates")
    pairs = ("edit_pairs", "verify_edit") * (1 + settings.edit_pairs.composed) if "edit_pairs" in active else ()
    return ("verify_edit", *pairs, *judgement_steps(settings))


def _measure_one(lake: Lake, settings: RefreshSettings, executor: Executor, name: str) -> dict[str, int | str]:
    if name in INSPECTIONS:
        return inspect(lake, settings, executor, name)
    if name == "edit_plan":
        return plan_edits(lake, settings)
    if name in COMPARISONS:
        return COMPARISONS[name](lake, settings)
    return measure_pending(lake, _measurement(lake, settings, name), executor, settings.ingest.rows_per_task)


def _measurement(lake: Lake, settings: RefreshSettings, name: str) -> Measurement:
    """How each measurement finds its subjects: the one place where operators meet the lake's tables."""
    if name == "quality":
        return Measurement(Quality, "SELECT image_id FROM images", {"bytes": "image_id"})
    if name == "caption":
        return Measurement(Caption, "SELECT image_id FROM images", {"bytes": "image_id"})
    if name in ROUTES:
        return route_measurement(lake, settings, name)
    measurement = check_measurement(lake, settings, name)
    if name == "edit_question":
        # A question that may be asked again leaves the verdicts open that were given without its answer.
        withdraw_passing_failures(lake, "op_edit_question", op_version(measurement.make()), followed_by=("op_verify_triplet",))
    return measurement


# --- score -----------------------------------------------------------------------------------------------------------


def score(lake: Lake, settings: RefreshSettings, executor: Executor, reward_dirs: dict[str, Path]) -> dict[str, Any]:
    """Score verified captions with reward_dirs['generate'], verified triplets with reward_dirs['edit'], and both with the further
    scorers of the settings. Verification comes first because it is cheap and a reward is not. A model is loaded only where rows
    are pending."""
    answer: dict[str, Any] = {}
    fits = "matches" if settings.policy.require_scene_language else "(matches OR NOT coalesce(in_language, false))"
    subjects = {
        "generate": f"SELECT DISTINCT caption_id AS subject_id, text, image_id FROM t2i_records WHERE error IS NULL AND "
        f"caption_id IS NOT NULL AND {fits}",
        "edit": f"SELECT DISTINCT edit_id AS subject_id, text, image_id, source_image_id FROM edit_records WHERE error IS NULL AND {fits} "
        "AND source <> 'exact'",
    }
    unknown = set(reward_dirs) - set(TASKS)
    if unknown:
        raise ValueError(f"there is no scoring task {', '.join(sorted(unknown))}: the tasks are {', '.join(TASKS)}")
    with lake.exclusive("refresh"):
        digests = file_digests(lake.files)
        further = [(task, each.model, each.kind) for each in settings.scoring.further for task in each.tasks]
        for task, directory, kind in [*((task, directory, REWARD) for task, directory in sorted(reward_dirs.items())), *further]:
            weights = weights_digest(Path(directory), digests)
            make = functools.partial(Score, task, Path(directory), weights, settings.scoring, kind)
            images = {"image_bytes": "image_id"} | ({"source_bytes": "source_image_id"} if make().with_sources else {})
            counts = measure_pending(lake, Measurement(make, subjects[task], images), executor, settings.ingest.rows_per_task)
            answer |= {f"{task if kind == REWARD else f'{task}_{kind}'}_{key}": value for key, value in counts.items()}
        digests.save()
    return answer


# --- curate ----------------------------------------------------------------------------------------------------------


def curate(lake: Lake, settings: RefreshSettings, seed: int) -> list[dict[str, Any]]:
    """Run the policies; returns name, version, rows and digest of every dataset that has candidates."""
    with lake.exclusive("refresh"):
        return run_policies(lake, policy_parameters(lake, settings, seed))


def policy_parameters(lake: Lake, settings: RefreshSettings, seed: int) -> dict[str, Any]:
    """What the $parameters of the policies stand for in a refresh with these settings."""
    parameters = settings.policy.model_dump() | {
        "sources": [source.name for source in source_list(lake, settings, seed)],
        "seed": str(seed),
        "benchmarks": [benchmark.name for benchmark in settings.benchmarks],
        "quotas": settings.quotas.read().as_parameter() if settings.quotas.cap else None,
        "quota_rows": settings.quotas.cap_rows,
    }
    if settings.scenes.fault_share == 0:
        parameters["allow_unanimous"] = ("*",)  # nothing is broken, so filters have nothing to find
    return parameters


def funnel(lake: Lake) -> pa.Table:
    """Rows in, rejected and out of every rule of the newest dataset versions: dataset, version, position, rule, rows_in,
    rejected, rows_out."""
    return lake.query("SELECT * FROM funnel")
