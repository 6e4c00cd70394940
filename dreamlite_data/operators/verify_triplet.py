"""Judge any triplet by the rules of its type: real photos, composites, small-world scenes, triplets of a provider.
Everything is measured before, so another threshold touches no pixel; a verdict says what failed and what could not be evaluated."""

from __future__ import annotations

import dataclasses
from typing import Any

import pyarrow as pa

from dreamlite_data import schema
from dreamlite_data.operators.base import by_row
from dreamlite_data.operators.verify_given import given_measures
from dreamlite_data.operators.verify_measures import NOT_APPLICABLE, Measures
from dreamlite_data.operators.verify_rules import Rules, Verdict, load_rules
from dreamlite_data.taxonomy import load_taxonomy

STORED = ("inside_change", "outside_change", "edited_fraction", "structure_outside")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The versions of the operators whose rows are judged; '' for one that is off, whose conditions are not evaluated."""

    measures: str
    similarity: str = ""
    text: str = ""
    question: str = ""


def triplet_subjects(table: str, version: str, inputs: Inputs) -> str:
    """SQL for every measured triplet without a row of `version` in `table`, with what other operators found about it. What is
    done goes out first, so that with nothing pending nothing else is read."""
    return f"""
WITH waiting AS (
    SELECT e.* FROM edits e ANTI JOIN (SELECT subject_id FROM {table} WHERE op_version = '{version}') d ON d.subject_id = e.edit_id
)
SELECT e.edit_id, e.instruction, e.edit_type, coalesce(r.origin, e.route) AS origin, e.target_image_id, e.source_image_id, m AS measures,
       m.rule, a.scene_json AS source_scene, b.scene_json AS target_scene, s.clip_target, s.clip_direction,
       x.words AS source_words, x.text_fraction AS source_text, y.words AS target_words, y.text_fraction AS target_text, q.yes AS vqa_yes
FROM waiting e
JOIN op_triplet_measures m ON m.subject_id = e.edit_id AND m.op_version = '{inputs.measures}'
LEFT JOIN edit_origins r ON r.edit_id = e.edit_id
LEFT JOIN current_caption a ON a.subject_id = e.source_image_id
LEFT JOIN current_caption b ON b.subject_id = e.target_image_id
LEFT JOIN op_edit_similarity s ON s.subject_id = e.edit_id AND s.op_version = '{inputs.similarity}'
LEFT JOIN op_text x ON x.subject_id = e.source_image_id AND x.op_version = '{inputs.text}'
LEFT JOIN op_text y ON y.subject_id = e.target_image_id AND y.op_version = '{inputs.text}'
LEFT JOIN op_edit_question q ON q.subject_id = e.edit_id AND q.op_version = '{inputs.question}'
"""


JUDGED = (
    "edit_id", "instruction", "edit_type", "origin", "measures", "source_scene", "target_scene", "clip_target", "clip_direction",
    "source_words", "source_text", "target_words", "target_text", "vqa_yes",
)  # fmt: skip
"""The columns of `triplet_subjects` that a judgement reads."""


class VerifyTriplet:
    """Operator over measured triplets; it reads no image."""

    name = "verify_triplet"
    version = 2
    reads = JUDGED
    table = "op_verify_triplet"
    resources = {"num_cpus": 1.0}
    schema = schema.OPERATORS["op_verify_triplet"]

    def __init__(self, inputs: Inputs, rules: Rules | None = None) -> None:
        self.inputs, self.rules = inputs, rules or load_rules()

    def config(self) -> dict[str, Any]:
        return judging(self.inputs, self.rules)

    def __call__(self, rows: pa.Table) -> pa.Table:
        return by_row(self._one, rows, "edit_id", self.schema)

    def _one(self, row: dict[str, Any]) -> dict[str, Any]:
        measures = row["measures"]
        if measures["error"] is not None:
            return {"error": measures["error"]}
        found = judged(row, self.rules)
        return {
            **{name: measures[name] for name in STORED},
            "rule": found.rule, "verdict": found.verdict, "failed": list(found.failed), "not_evaluated": list(found.not_evaluated),
        }  # fmt: skip


def judging(inputs: Inputs, rules: Rules) -> dict[str, Any]:
    """What decides a judgement, for the key of an operator."""
    return {"inputs": dataclasses.asdict(inputs), "rules": rules.digest, "taxonomy": load_taxonomy().digest}


def judged(row: dict[str, Any], rules: Rules) -> Verdict:
    """Hold a row of `triplet_subjects` against the rule of its type. Pictures of different size fail whatever else they show."""
    kind = load_taxonomy().edit_type(row["edit_type"], row["origin"])
    stored = row["measures"]
    if stored["sizes"] is not None:
        return Verdict(rules.name_for(kind), "fail", (f"size {stored['sizes']}",), ())
    measures: Measures = {name: NOT_APPLICABLE if stored[name] is None else stored[name] for name in schema.TRIPLET_MEASURES}
    return rules.judge(kind, measures | dict.fromkeys(stored["absent"]) | given_measures(row))
