"""Every label has one place, unknown ones say so, and the quotas are the published mix."""

from __future__ import annotations

import pytest

from dreamlite_data import scenes
from dreamlite_data.lake import Lake
from dreamlite_data.operators import composite, exact
from dreamlite_data.taxonomy import EditType, TaxonomyError, load_taxonomy, read_taxonomy, record_taxonomy

UNMAPPED = EditType("unmapped", "unmapped")


def test_every_kind_that_we_make_ourselves_is_mapped() -> None:
    taxonomy = load_taxonomy()
    ours = [("scenes", kind) for kind in scenes.EDIT_KINDS] + [("composite", kind) for kind in composite.OPERATIONS]
    for operation in exact.OPERATIONS.values():
        ours += [("exact", words.edit_type) for words in (operation.words, operation.inverse) if words is not None]
    assert {origin_label: taxonomy.edit_type(origin_label[1], origin_label[0]) for origin_label in ours if
            taxonomy.edit_type(origin_label[1], origin_label[0]) not in taxonomy} == {}  # fmt: skip
    assert taxonomy.edit_type("multi_op", "scene_graph") == EditType("composite", "multi_op")


def test_the_origin_decides_where_labels_differ_and_unknown_ones_are_said_to_be() -> None:
    taxonomy = load_taxonomy()
    assert taxonomy.edit_type("style", "scenes_1234_s0_edit") == EditType("scene", "background")
    assert taxonomy.edit_type("style", "OmniEdit-Filtered-1.2M") == EditType("style", "art")
    assert taxonomy.edit_type("Remove an existing object", "Pico-Banana-400K") == EditType("object", "remove")
    assert taxonomy.edit_type("Color Alter", "my_own_set") == EditType("attribute", "colour")  # all sets that have it agree
    assert taxonomy.edit_type("object/add") == EditType("object", "add")
    assert taxonomy.edit_type("replace", "my_own_set") == EditType("object", "replace")
    assert taxonomy.edit_type("make it nicer", "omniedit") == taxonomy.edit_type(None) == taxonomy.edit_type("") == UNMAPPED


@pytest.mark.parametrize(("old", "new", "message"), [
    ("recolour: attribute/colour", "recolour: attribute/hue", "leads to 'attribute/hue', which is not among the levels"),
    ("    color: attribute/colour\n    background: scene/background\n    style: style/art\n    rotate", "    Color: attribute/colour\n    rotate",
     "write any.Color as 'color'"),
    ("level1: [camera]}", "level1: []}", "must name each level1 once"),
])  # fmt: skip
def test_a_broken_taxonomy_is_refused(old: str, new: str, message: str) -> None:
    from importlib import resources

    text = resources.files("dreamlite_data").joinpath("taxonomy.yaml").read_text()
    assert text.count(old) >= 1
    with pytest.raises(TaxonomyError, match=message):
        read_taxonomy(text.replace(old, new, 1))


def _edit(number: int, edit_type: str | None, source: str) -> tuple[dict, dict]:
    identity = f"e{number}"
    return (
        {"edit_id": identity, "source_image_id": "a", "target_image_id": "b", "instruction": "x", "edit_type": edit_type, "route": "provider"},
        {"subject_id": identity, "op_version": "v", "source": source, "domain": "other", "task": "edit", "edit_id": identity},
    )


def test_sql_groups_by_type_and_says_what_is_missing(lake: Lake) -> None:
    assert record_taxonomy(lake)
    snapshot = lake.snapshot()
    assert not record_taxonomy(lake) and lake.snapshot() == snapshot
    rows = [_edit(0, "style", "scenes_x"), _edit(1, "Style", "own"), _edit(2, "never heard of", "own"), _edit(3, None, "own")]
    rows += [_edit(4 + number, "add", "own") for number in range(6)]
    lake.append({
        "edits": [edit for edit, _ in rows], "op_ingest": [record for _, record in rows],
        "operator_versions": [{"name": "ingest", "op_version": "v", "config_json": "{}", "position": 0}],
        "provenance": [{"image_id": "b", "record_id": "e1", "role": "target", "source": "own", "origin": "OmniEdit-Filtered-1.2M"}],
        "datasets": [{"name": "edit", "version": 1}],
        "dataset_rows": [{"name": "edit", "version": 1, "row_id": record["subject_id"], "task": "edit"} for _, record in rows],
    })  # fmt: skip
    types = {row["row_id"]: (row["level1"], row["level2"]) for row in lake.query_read_only("SELECT * FROM edit_types").to_pylist()}
    taxonomy = load_taxonomy()
    for edit, record in rows:  # the view and the function are one rule
        kind = taxonomy.edit_type(edit["edit_type"], "OmniEdit-Filtered-1.2M" if edit["edit_id"] == "e1" else record["source"])
        assert types[edit["edit_id"]] == (kind.level1, kind.level2)
    assert [types[f"e{number}"][0] for number in range(4)] == ["scene", "style", "unmapped", "unmapped"]
    quota = {row["category"]: row for row in lake.query_read_only("SELECT * FROM quota WHERE mix = 'dreamlite'").to_pylist()}
    assert sum(row["wanted_share"] for row in quota.values()) == pytest.approx(1)
    assert quota["local"]["wanted_share"] == pytest.approx(830 / 1741)
    assert {name: (row["have"], row["missing"]) for name, row in quota.items()} == {
        "local": (6, 0), "understanding": (0, 3), "global": (1, 1), "view": (0, 1), "style": (1, 0), "unmapped": (2, 0)}  # fmt: skip
