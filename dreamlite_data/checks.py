"""The measurements that check words against pictures: what each reads, and in which order the dear ones follow the cheap ones.
A judgement names the versions of all that it reads, so a model that is switched on judges anew and decodes nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable

from dreamlite_data.chat.backends import chat_weights
from dreamlite_data.inspection import embed_operator
from dreamlite_data.lake import Lake
from dreamlite_data.operators.base import op_version
from dreamlite_data.operators.edit_question import EditQuestion
from dreamlite_data.operators.edit_similarity import EditSimilarity, similarity_subjects
from dreamlite_data.operators.embed import Embed
from dreamlite_data.operators.run import Measurement
from dreamlite_data.operators.text import Text
from dreamlite_data.operators.verify import VerifyCaption, VerifyEdit
from dreamlite_data.operators.verify_rules import load_rules
from dreamlite_data.operators.verify_triplet import Inputs, VerifyTriplet, triplet_subjects
from dreamlite_data.responses import responses_folder
from dreamlite_data.settings import RefreshSettings
from dreamlite_data.sources.digests import DigestCache, file_digests

PICTURES = {"target_bytes": "target_image_id", "source_bytes": "source_image_id"}


def judgement_steps(settings: RefreshSettings) -> tuple[str, ...]:
    """What follows the measures of triplets, the dearest last but for the verdict."""
    similarity = ("edit_similarity",) if settings.embed.model is not None else ()
    question = ("edit_question",) if settings.judge is not None else ()
    return (*similarity, *question, "verify_triplet")


def check_measurement(lake: Lake, settings: RefreshSettings, name: str) -> Measurement:
    """How a check finds its subjects. Raises LookupError where the scenes have not been read yet, and what naming the
    weights of a model raises."""
    reading = lake.query("SELECT op_version FROM current_versions WHERE name = 'caption'")["op_version"].to_pylist()
    if not reading:
        raise LookupError(f"the measurement {name!r} compares with what was read from the images: run 'caption' first")
    if name == "verify_caption":
        return Measurement(
            functools.partial(VerifyCaption, reading[0]),
            "SELECT c.caption_id, c.text, k.scene_json, coalesce(k.reason, k.error) AS reading_reason FROM captions c "
            "JOIN current_caption k ON k.subject_id = c.image_id",
        )
    verify_edit = functools.partial(VerifyEdit, reading[0])
    if name == "verify_edit":
        return Measurement(verify_edit, _edit_subjects(op_version(verify_edit())), PICTURES)
    digests = file_digests(lake.files)
    makes = _judges(lake, settings, op_version(verify_edit()), digests)
    digests.save()
    return makes[name]


def _edit_subjects(version: str) -> str:
    """SQL for every triplet without a row of `version`. What is done goes out first: masks are bytes, and with nothing pending
    none of them is read."""
    return f"""
WITH waiting AS (
    SELECT e.* FROM edits e ANTI JOIN (SELECT subject_id FROM op_verify_edit WHERE op_version = '{version}') d ON d.subject_id = e.edit_id
)
SELECT e.edit_id, e.instruction, e.edit_type, coalesce(r.origin, e.route) AS origin, e.target_image_id, e.source_image_id, m.mask_png,
       a.scene_json AS source_scene, b.scene_json AS target_scene
FROM waiting e
JOIN current_caption a ON a.subject_id = e.source_image_id
JOIN current_caption b ON b.subject_id = e.target_image_id
LEFT JOIN edit_origins r ON r.edit_id = e.edit_id
LEFT JOIN edit_masks m ON m.edit_id = e.edit_id
"""


def _judges(lake: Lake, settings: RefreshSettings, measures: str, digests: DigestCache) -> dict[str, Measurement]:
    """The checks that read no pixel themselves, by name; each names the versions of those before it."""
    found: dict[str, Measurement] = {}
    versions = {"measures": measures, "text": op_version(Text()) if settings.text.ocr else ""}
    if settings.embed.model is not None:
        similarity = embed_operator(EditSimilarity, settings, digests)
        embedded = op_version(embed_operator(Embed, settings, digests)())
        found["edit_similarity"] = Measurement(similarity, similarity_subjects(embedded))
        versions["similarity"] = op_version(similarity())
    if settings.judge is not None:
        weights = chat_weights(settings.judge, digests, "refresh.judge")
        question = functools.partial(EditQuestion, settings.judge, weights, responses_folder(lake.files), Inputs(**versions))
        version = op_version(question())
        rules = ", ".join(f"'{rule}'" for rule in load_rules().reading("vqa_yes"))
        subjects = f"SELECT * FROM ({triplet_subjects(EditQuestion.table, version, Inputs(**versions))}) WHERE rule IN ({rules})"
        found["edit_question"] = Measurement(question, subjects, PICTURES)
        versions["question"] = version
    judge: Callable[[], VerifyTriplet] = functools.partial(VerifyTriplet, Inputs(**versions))
    found["verify_triplet"] = Measurement(judge, triplet_subjects(VerifyTriplet.table, op_version(judge()), Inputs(**versions)))
    return found
