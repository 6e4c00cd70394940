"""More triplets from verified ones of the small world: the way back of an edit, and two edits in a row as one.
Works on readings and words alone: no picture is opened, for source and target are stored already."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from dreamlite_data import scenes, schema
from dreamlite_data.operators.base import by_row
from dreamlite_data.operators.draw import generator
from dreamlite_data.operators.edit import Form, instruction_rows
from dreamlite_data.operators.ingest import edit_id
from dreamlite_data.operators.instruction import JOINT, parse_instruction

INVERSE_SUBJECTS = """
SELECT DISTINCT 'inverse:' || r.edit_id AS pair_id, 'inverse' AS relation, r.edit_id AS parent_id, r.image_id AS source_image_id,
       r.source_image_id AS target_image_id, a.scene_json AS source_scene, b.scene_json AS target_scene,
       CAST(NULL AS VARCHAR) AS first_words, CAST(NULL AS VARCHAR) AS second_words
FROM edit_records r
JOIN current_caption a ON a.subject_id = r.image_id
JOIN current_caption b ON b.subject_id = r.source_image_id
WHERE r.error IS NULL AND r.matches AND r.route = 'provider' AND a.scene_json IS NOT NULL AND b.scene_json IS NOT NULL
"""
"""Every verified small-world triplet of a source, seen from its target."""

COMPOSED_SUBJECTS = """
WITH steps AS (
    SELECT DISTINCT edit_id, source_image_id, image_id, text, CASE WHEN relation = 'inverse' THEN parent_edit_id ELSE edit_id END AS root_id
    FROM edit_records
    WHERE error IS NULL AND matches AND relation IN ('', 'inverse') AND (route = 'provider' OR route = 'scene_graph')
)
SELECT 'composed:' || f.edit_id || ':' || s.edit_id AS pair_id, 'composed' AS relation, f.root_id AS parent_id,
       f.source_image_id AS source_image_id, s.image_id AS target_image_id, a.scene_json AS source_scene, b.scene_json AS target_scene,
       f.text AS first_words, s.text AS second_words
FROM steps f JOIN steps s ON s.source_image_id = f.image_id AND s.image_id <> f.source_image_id AND s.root_id <> f.root_id
JOIN current_caption a ON a.subject_id = f.source_image_id
JOIN current_caption b ON b.subject_id = s.image_id
WHERE a.scene_json IS NOT NULL AND b.scene_json IS NOT NULL
"""
"""Two verified edits of which the second begins where the first ends, and which are not the two directions of one."""


class Pairs:
    """Operator over pairs (see the subjects above); its triplets go to `edits`, those that the language can say."""

    name = "edit_pairs"
    version = 1
    reads = ("pair_id", "relation", "parent_id", "source_image_id", "target_image_id", "source_scene", "target_scene", "first_words", "second_words")
    table = "op_edit"
    resources = {"num_cpus": 1.0}
    schema = schema.OPERATORS["op_edit"]

    def __init__(self, composed: bool = True) -> None:
        self.composed = composed
        self._edits: dict[str, dict[str, Any]] = {}
        self._instructions: dict[str, dict[str, Any]] = {}

    def config(self) -> dict[str, Any]:
        return {"composed": self.composed}

    def __call__(self, rows: pa.Table) -> pa.Table:
        self._edits, self._instructions = {}, {}
        return by_row(self._one, rows, "pair_id", self.schema)

    def _one(self, row: dict[str, Any]) -> dict[str, Any]:
        source, target = (scenes.Scene.from_json(row[name]) for name in ("source_scene", "target_scene"))
        said = _way_back(source, target, row["pair_id"]) if row["relation"] == "inverse" else _joined(source, target, row)
        if said is None:
            return {"edits": 0, "edit_ids": []}
        words, edit_type = said
        identity = edit_id(row["source_image_id"], row["target_image_id"], words)
        self._edits[identity] = {
            "edit_id": identity, "source_image_id": row["source_image_id"], "target_image_id": row["target_image_id"],
            "instruction": words, "edit_type": edit_type, "route": "scene_graph", "parent_edit_id": row["parent_id"],
            "relation": row["relation"], "rejected": False,
        }  # fmt: skip
        form = Form("short" if row["relation"] == "inverse" else "long", words, f"scenes/{row['relation']}/{edit_type}")
        self._instructions |= {item["instruction_id"]: item for item in instruction_rows(identity, [form], "scene_graph")}
        return {"edits": 1, "edit_ids": [identity]}

    def side_tables(self, rows: pa.Table, answer: pa.Table) -> dict[str, pa.Table]:
        """The triplets of the call just made, and their words."""
        found = {"edits": self._edits, "instructions": self._instructions}
        return {name: schema.rows_table(name, [items[key] for key in sorted(items)]) for name, items in found.items()}


def _way_back(source: scenes.Scene, target: scenes.Scene, pair_id: str) -> tuple[str, str] | None:
    """Instruction and kind of the one edit from `source` to `target`; None where no single edit leads there."""
    plain = scenes.describe_difference(source, target)
    if plain is None:
        return None
    edit, _ = parse_instruction(plain, source)
    if edit is None:
        return None
    return scenes.instruction(edit, source, generator("wording", pair_id)), edit.kind


def _joined(source: scenes.Scene, target: scenes.Scene, row: dict[str, Any]) -> tuple[str, str] | None:
    """The two instructions in a row; None where one edit would do as well, for then the pair teaches nothing new."""
    if source.key() == target.key() or scenes.describe_difference(source, target) is not None:
        return None
    return JOINT.join((row["first_words"], row["second_words"])), "multi_op"
