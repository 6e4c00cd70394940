"""The routes by which edit triplets are made: exact operators, cut-outs, models, pairs; which are on, and how each finds its subjects.
A route that is switched off leaves its rows in the lake and its triplets out of the views."""

from __future__ import annotations

import functools
from pathlib import Path

from dreamlite_data.chat.backends import chat_model, chat_weights
from dreamlite_data.lake import Lake
from dreamlite_data.operators.base import op_version
from dreamlite_data.operators.composite import CompositeEditor, CompositeInstructor, open_cutouts
from dreamlite_data.operators.cutouts import folder_digest
from dreamlite_data.operators.edit import Edit, ExactEditor, ExactInstructor
from dreamlite_data.operators.edit_plan import EditPlan
from dreamlite_data.operators.pairs import COMPOSED_SUBJECTS, INVERSE_SUBJECTS, Pairs
from dreamlite_data.operators.run import Measurement, switch_off, withdraw_passing_failures
from dreamlite_data.pictures import Pictures, pictures_folder
from dreamlite_data.responses import Responses, responses_folder
from dreamlite_data.settings import PHOTOS, EditModelSettings, RefreshSettings
from dreamlite_data.sources.digests import file_digests
from dreamlite_data.weights import weights_digest

ROUTES = ("edit", "edit_composite", "edit_model", "edit_pairs")
"""Names of the operators, in the order in which they run."""
PLANNED_ROUTES = {"exact": "edit", "composite": "edit_composite", "model": "edit_model"}
"""The routes that quotas steer: the column of a plan, and the operator that follows it."""


def active_routes(settings: RefreshSettings) -> list[str]:
    """The routes that the settings switch on. Exact operators always are, if only to make none."""
    on = {
        "edit": True,
        "edit_composite": settings.composite.per_image > 0,
        "edit_model": settings.edit_model.editor is not None,
        "edit_pairs": settings.edit_pairs.inverse or settings.edit_pairs.composed,
    }
    return [name for name in ROUTES if on[name]]


def forget_unused_routes(lake: Lake, settings: RefreshSettings) -> list[str]:
    """Take the triplets of routes that were on and are off now out of the views; returns the active routes."""
    active = active_routes(settings)
    switch_off(lake, lambda name: name in ROUTES and name not in active)
    return active


def route_measurement(lake: Lake, settings: RefreshSettings, name: str) -> Measurement:
    """How a route finds its subjects and builds its operator."""
    if name == "edit_pairs":
        parts = [INVERSE_SUBJECTS] * settings.edit_pairs.inverse + [COMPOSED_SUBJECTS] * settings.edit_pairs.composed
        subjects = " UNION ALL ".join(f"SELECT * FROM ({part})" for part in parts)
        return Measurement(functools.partial(Pairs, settings.edit_pairs.composed), subjects)
    images, plan = photo_subjects(settings), ""
    if settings.quotas.steer:
        plan = op_version(EditPlan.of(settings))
        images = planned_subjects(images, name, plan)
    elif name == "edit" and not settings.photos.edits_per_image:
        images += " AND false"
    if name == "edit":
        make = functools.partial(exact_route, settings.photos.edits_per_image, settings.photos.inverse_edits, plan)
        return Measurement(make, images, {"bytes": "image_id"})
    digests = file_digests(lake.files)
    if name == "edit_composite":
        folder = settings.composite.cutouts
        digest = folder_digest(folder, digests) if folder else ""
        make = functools.partial(composite_route, settings.composite.per_image, str(folder) if folder else None, digest, settings.composite.inverse, plan)
    else:
        models = settings.edit_model
        folders = {part: path for part in ("editor", "reward") if (path := getattr(models, part)) is not None}
        lost = [f"refresh.edit_model.{part} ({path})" for part, path in folders.items() if not path.is_dir()]
        if lost:
            raise FileNotFoundError(f"there is no model folder at {', '.join(lost)}: correct the path or mount it")
        weights = {part: weights_digest(str(path), None, digests, f"refresh.edit_model.{part}") for part, path in folders.items()}
        weights["instructor"] = chat_weights(models.instructor, digests, "refresh.edit_model.instructor")
        make = functools.partial(model_route, models, weights, lake.files, plan)
        withdraw_passing_failures(lake, "op_edit", op_version(make()))
    digests.save()
    return Measurement(make, images, {"bytes": "image_id"})


def photo_subjects(settings: RefreshSettings) -> str:
    """SQL for the pictures that routes start from, image_id."""
    own = ", ".join(f"'{name}'" for name in settings.edit_sources if name != PHOTOS)  # names are of [a-z0-9_] only
    places = [f"r.domain = '{PHOTOS}'"] * (PHOTOS in settings.edit_sources) + [f"r.source IN ({own})"] * bool(own)
    return (
        "SELECT DISTINCT r.image_id FROM current_ingest r JOIN images i ON i.image_id = r.image_id "
        f"WHERE ({' OR '.join(places) or 'false'}) AND r.task = 'generate' AND least(i.width, i.height) >= {int(settings.policy.min_side_px)}"
    )


def planned_subjects(images: str, name: str, plan: str) -> str:
    """SQL for those of `images` of which the plan asks this route for anything: image_id and `wanted`, the types."""
    route = next(route for route, operator in PLANNED_ROUTES.items() if operator == name)
    return (
        f"SELECT i.image_id, p.{route} AS wanted FROM ({images}) i JOIN op_edit_plan p ON p.subject_id = i.image_id "
        f"WHERE p.op_version = '{plan}' AND len(p.{route}) > 0"
    )


def exact_route(count: int, inverse: bool, plan: str = "") -> Edit:
    """Exact operations, with no weights."""
    return Edit(count, ExactInstructor(), ExactEditor(inverse), plan=plan)


def composite_route(count: int, folder: str | None, digest: str, inverse: bool, plan: str = "") -> Edit:
    """Cut-outs pasted onto the picture."""
    cutouts = open_cutouts(folder, digest)
    return Edit(count, CompositeInstructor(cutouts), CompositeEditor(cutouts, inverse), "edit_composite", plan=plan)


def model_route(settings: EditModelSettings, digests: dict[str, str], lake_files: Path, plan: str = "") -> Edit:
    """A vision-language model that proposes and a diffusion pipeline that edits; what either gave is kept below `lake_files`.
    Nothing is loaded before the first picture."""
    from dreamlite_data.operators.edit_model import PipelineEditor
    from dreamlite_data.operators.instruction_model import VlmInstructor

    folder = responses_folder(lake_files)
    instructor = VlmInstructor(
        chat_model(settings.instructor, digests["instructor"]), Responses(folder, settings.instructor.tries), settings.per_image,
        settings.max_new_tokens,
    )  # fmt: skip
    editor = PipelineEditor(
        settings.editor, digests["editor"], settings.tries, settings.inference_steps,
        Pictures(pictures_folder(lake_files), settings.picture_cache_mb), Responses(folder), device=settings.device,
        reward=settings.reward, reward_weights=digests.get("reward", ""), min_reward=settings.min_reward,
    )  # fmt: skip
    gpus = max(float(settings.device.startswith("cuda")), settings.instructor.num_gpus)
    return Edit(settings.per_image, instructor, editor, "edit_model", gpus, plan)
