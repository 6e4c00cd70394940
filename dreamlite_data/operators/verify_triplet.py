"""Verify any triplet by the rules of its type: real photos, composites, small-world scenes, triplets of a provider.
Measures change inside and outside the mask; a verdict says which condition failed and which could not be evaluated."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa

from dreamlite_data import scenes, schema
from dreamlite_data.images import decode_stored
from dreamlite_data.operators.base import by_row
from dreamlite_data.operators.change import changed_pixels, decode_mask
from dreamlite_data.operators.instruction import apply_steps, parse_steps
from dreamlite_data.operators.verify_measures import measure_triplet
from dreamlite_data.operators.verify_rules import Rules, load_rules
from dreamlite_data.taxonomy import load_taxonomy


def triplet_subjects(version: str) -> str:
    """SQL for every stored triplet without a row of `version`, with what is known of its mask. What is done goes out first:
    masks are bytes, and with nothing pending none of them is read."""
    return f"""
WITH waiting AS (
    SELECT e.* FROM edits e ANTI JOIN (SELECT subject_id FROM op_verify_triplet WHERE op_version = '{version}') d ON d.subject_id = e.edit_id
)
SELECT e.edit_id, e.instruction, e.edit_type, coalesce(r.origin, e.route) AS origin, e.target_image_id, e.source_image_id, m.mask_png,
       k.scene_json AS source_scene, CAST(NULL AS VARCHAR) AS given_json
FROM waiting e
LEFT JOIN edit_origins r ON r.edit_id = e.edit_id
LEFT JOIN edit_masks m ON m.edit_id = e.edit_id
LEFT JOIN current_caption k ON k.subject_id = e.source_image_id
"""


class VerifyTriplet:
    """Operator over triplets with both images. `mask_png` is the known mask or null; `source_scene` the reading of a
    small-world source or null, from which the mask follows; `given_json` holds measures that other operators took (CLIP
    similarities, words that OCR found, detected objects) as a JSON object by name, or null."""

    name = "verify_triplet"
    version = 1
    reads = ("edit_id", "instruction", "edit_type", "origin", "source_bytes", "target_bytes", "mask_png", "source_scene", "given_json")
    table = "op_verify_triplet"
    resources = {"num_cpus": 1.0}
    schema = schema.OPERATORS["op_verify_triplet"]

    def __init__(self, inputs: str = "", rules: Rules | None = None) -> None:
        """`inputs` names the versions of the operators whose rows are read: other ones verify anew."""
        self.inputs, self.rules = inputs, rules or load_rules()

    def config(self) -> dict[str, Any]:
        return {"inputs": self.inputs, "rules": self.rules.digest, "taxonomy": load_taxonomy().digest}

    def __call__(self, rows: pa.Table) -> pa.Table:
        return by_row(self._one, rows, "edit_id", self.schema)

    def _one(self, row: dict[str, Any]) -> dict[str, Any]:
        kind = load_taxonomy().edit_type(row["edit_type"], row["origin"])
        source, target = decode_stored(row["source_bytes"]), decode_stored(row["target_bytes"])
        if source.shape != target.shape:
            sizes = " -> ".join(f"{pixels.shape[1]}x{pixels.shape[0]}" for pixels in (source, target))
            return {"rule": self.rules.name_for(kind), "verdict": "fail", "failed": [f"size {sizes}"], "not_evaluated": []}
        mask = decode_mask(row["mask_png"]) if row["mask_png"] else scene_mask(row["source_scene"], row["instruction"])
        if mask is not None and mask.shape != source.shape[:2]:
            raise ValueError(f"the mask has {mask.shape[1]} x {mask.shape[0]} px, the pictures {source.shape[1]} x {source.shape[0]}")
        measures = measure_triplet(source, target, row["instruction"], mask, self.rules.measures(kind))
        if row["given_json"]:
            measures |= json.loads(row["given_json"])
        found = self.rules.judge(kind, measures)
        stored = {name: measures[name] for name in ("inside_change", "outside_change", "edited_fraction", "structure_outside")}
        return {
            **{name: None if value is None or np.isnan(value) else value for name, value in stored.items()},
            "rule": found.rule, "verdict": found.verdict, "failed": list(found.failed), "not_evaluated": list(found.not_evaluated),
        }  # fmt: skip


def scene_mask(scene_json: str | None, instruction: str) -> np.ndarray | None:
    """bool [64, 64]: where an instruction in the language of scenes changes the scene that was read from the source; None
    where there is no scene or the words are of another language."""
    if not scene_json:
        return None
    seen = scenes.Scene.from_json(scene_json)
    steps, _ = parse_steps(instruction, seen)
    if steps is None:
        return None
    return changed_pixels(scenes.render(seen), scenes.render(apply_steps(seen, steps)))
