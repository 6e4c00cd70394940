"""Check words against pixels: a caption against the scene read from its image, an edit's target against its instruction.
Also measures what changed between source and target, where it changed, and whether anything changed at all."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import ndimage

from dreamlite_data import scenes, schema
from dreamlite_data.images import decode_stored
from dreamlite_data.operators.base import answered, by_row
from dreamlite_data.operators.change import CHANGED_LEVELS, MASK_CELLS, changed_pixels, decode_mask, mask_cells
from dreamlite_data.operators.exact import is_exact
from dreamlite_data.operators.instruction import apply_steps, parse_steps
from dreamlite_data.operators.verify_measures import MEASURES_VERSION, measure_triplet
from dreamlite_data.operators.verify_rules import Rules, load_rules
from dreamlite_data.taxonomy import load_taxonomy

DRIFT_PX = 3.0


class VerifyCaption:
    """Operator over captions and the readings of their images: no pixels are touched again."""

    name = "verify_caption"
    version = 1
    reads = ("caption_id", "text", "scene_json", "reading_reason")
    table = "op_verify_caption"
    resources = {"num_cpus": 1.0}
    schema = schema.OPERATORS["op_verify_caption"]

    def __init__(self, reading: str = "") -> None:
        """`reading` is the version of the captioner whose readings are compared with: another one verifies anew."""
        self.reading = reading

    def config(self) -> dict[str, Any]:
        return {"reading": self.reading}

    def __call__(self, rows: pa.Table) -> pa.Table:
        return by_row(self._one, rows, "caption_id", self.schema)

    @staticmethod
    def _one(row: dict[str, Any]) -> dict[str, Any]:
        said = scenes.parse_caption(row["text"])
        if said is None:
            return {"in_language": False, "matches": False, "reason": "the caption is not in the language of scenes"}
        if row["scene_json"] is None:
            return {"in_language": True, "matches": False, "reason": f"no scene was read: {row['reading_reason']}"}
        seen = scenes.Scene.from_json(row["scene_json"])
        same = seen.key() == said.key()
        return {"in_language": True, "matches": same, "reason": None if same else f"the image shows {scenes.caption(seen)}"}


class VerifyEdit:
    """Operator over triplets with both images and both readings. One decode serves two tables: what the small world and the
    exact operations say goes to `op_verify_edit`, what the rules of the triplet's type read to `op_triplet_measures`. `mask_png` is
    the known mask or null; that of a small-world edit follows from the reading of its source."""

    name = "verify_edit"
    version = 3
    reads = (
        "edit_id", "instruction", "edit_type", "origin", "source_bytes", "target_bytes", "source_scene", "target_scene", "mask_png",
    )  # fmt: skip
    table = "op_verify_edit"
    resources = {"num_cpus": 1.0}
    schema = schema.OPERATORS["op_verify_edit"]

    def __init__(self, reading: str = "", rules: Rules | None = None) -> None:
        """`reading` as in VerifyCaption; `rules` say which measures are taken, and not how they are judged."""
        self.reading, self.rules = reading, rules or load_rules()
        self._measured: list[dict[str, Any]] = []

    def config(self) -> dict[str, Any]:
        return {
            "reading": self.reading, "changed_levels": CHANGED_LEVELS, "mask_cells": MASK_CELLS, "drift_px": DRIFT_PX,
            "measures": MEASURES_VERSION, "read_by_rules": self.rules.reads_digest(), "taxonomy": load_taxonomy().digest,
        }  # fmt: skip

    def __call__(self, rows: pa.Table) -> pa.Table:
        self._measured, answers = [], []
        for row in rows.to_pylist():
            pair = _Pair(row["source_bytes"], row["target_bytes"])
            answers.append({"subject_id": row["edit_id"], **answered(self._one, row, pair)})
            self._measured.append({"subject_id": row["edit_id"], **answered(self._measures, row, pair)})
        return pa.Table.from_pylist(answers, schema=self.schema)

    def side_tables(self, rows: pa.Table, answer: pa.Table) -> dict[str, pa.Table]:
        """The measures of the call just made."""
        return {"op_triplet_measures": schema.rows_table("op_triplet_measures", self._measured)}

    def _measures(self, row: dict[str, Any], pair: _Pair) -> dict[str, Any]:
        kind = load_taxonomy().edit_type(row["edit_type"], row["origin"])
        source, target = pair.pixels
        rule = self.rules.name_for(kind)
        if source.shape != target.shape:
            return {"rule": rule, "sizes": " -> ".join(f"{pixels.shape[1]}x{pixels.shape[0]}" for pixels in (source, target))}
        mask = decode_mask(row["mask_png"]) if row["mask_png"] else scene_mask(row["source_scene"], row["instruction"])
        if mask is not None and mask.shape != source.shape[:2]:
            raise ValueError(f"the mask has {mask.shape[1]} x {mask.shape[0]} px, the pictures {source.shape[1]} x {source.shape[0]}")
        reads = self.rules.measures(kind)
        found = measure_triplet(source, target, row["instruction"], mask, reads)
        absent = sorted(name for name, value in found.items() if value is None and name in reads)
        return {"rule": rule, "absent": absent, **{name: value for name, value in found.items() if value is not None and not np.isnan(value)}}

    @staticmethod
    def _one(row: dict[str, Any], pair: _Pair) -> dict[str, Any]:
        source, target = pair.pixels
        if source.shape != target.shape:
            sizes = " and ".join(f"{pixels.shape[1]} x {pixels.shape[0]} px" for pixels in (source, target))
            return {"in_language": False, "matches": False, "reason": f"source and target differ in size: {sizes}"}
        changed = changed_pixels(source, target)
        answer = {
            "edited_fraction": float(changed.mean()), "outside_fraction": None, "edit_mask": mask_cells(changed),
            "in_language": False, "matches": False, "reason": None,
        }  # fmt: skip
        # An image's id is the hash of its stored bytes, and the amounts of an exact operation come from the id.
        ids = [hashlib.sha256(row[name]).hexdigest() for name in ("source_bytes", "target_bytes")]
        same = is_exact(row["instruction"], source, ids[0], target, ids[1])
        if same is not None:
            reason = None if same else "the target is not what the operation gives"
            return answer | {"in_language": True, "matches": same, "outside_fraction": 0.0 if same else None, "reason": reason}
        seen = scenes.Scene.from_json(row["source_scene"]) if row["source_scene"] else None
        shown = scenes.Scene.from_json(row["target_scene"]) if row["target_scene"] else None
        steps, reason = parse_steps(row["instruction"], seen)
        answer["in_language"] = steps is not None or reason != "unknown"
        if steps is None or seen is None:
            text = "the instruction is not in the language of scenes" if reason == "unknown" else reason
            return answer | {"reason": text}
        wanted = apply_steps(seen, steps)
        answer["outside_fraction"] = float((changed & ~allowed_area(seen, wanted)).mean())
        return answer | _compare(seen, wanted, shown)


class _Pair:
    """Both pictures, decoded when the first of two readers asks; bytes that are no image fail for both."""

    def __init__(self, source: bytes, target: bytes) -> None:
        self._payloads = (source, target)

    @functools.cached_property
    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [H, W, 3] each."""
        source, target = (decode_stored(payload) for payload in self._payloads)
        return source, target


def _compare(source: scenes.Scene, wanted: scenes.Scene, shown: scenes.Scene | None) -> dict[str, Any]:
    if shown is None:
        return {"matches": False, "reason": "no scene was read from the target"}
    if shown.key() != wanted.key():
        return {"matches": False, "reason": f"the target shows {scenes.caption(shown)}"}
    places = {item.key(): item.centre_px() for item in shown.objects}
    for item in source.objects:
        if item in wanted.objects and np.hypot(*np.subtract(places[item.key()], item.centre_px())) > DRIFT_PX:
            return {"matches": False, "reason": f"the {item.colour} {item.shape} moved although the edit leaves it alone"}
    return {"matches": True, "reason": None}


def allowed_area(source: scenes.Scene, wanted: scenes.Scene) -> np.ndarray:
    """bool [64, 64]: where this edit may change pixels, with room for jitter around the shapes it touches."""
    expected = changed_pixels(scenes.render(source), scenes.render(wanted))
    return ndimage.binary_dilation(expected, iterations=3)


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
