"""Rules tell right edits from spoilt ones as well as the README says, and what they could not look at they say."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from dreamlite_data import scenes
from dreamlite_data.images import encode_png
from dreamlite_data.operators.change import encode_mask, estimated_mask, regions, similarity_map
from dreamlite_data.operators.cutouts import DrawnCutOuts
from dreamlite_data.operators.verify_rules import RuleError, load_rules, read_rules
from dreamlite_data.operators.verify_triplet import VerifyTriplet
from dreamlite_data.operators.verify_truth import Case, composite_truth, exact_truth, report_of, scene_truth, truth_photos
from dreamlite_data.taxonomy import EditType, load_taxonomy

SEED = 20_011
"""Not the calibration's: that was 0."""


# --- the truth sets --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composites() -> list[Case]:
    return list(composite_truth(truth_photos(8, SEED), DrawnCutOuts()))


def _totals(cases: list[Case], masks: bool = True) -> tuple[float, dict[str, float]]:
    rows = report_of(cases, masks)
    heads = [row for row in rows if row["fault"] == "all"]
    recall = sum(row["passed"] for row in heads) / sum(row["true"] for row in heads)
    caught: dict[str, list[int]] = {}
    for row in rows:
        if row["fault"] != "all":
            found = caught.setdefault(row["fault"], [0, 0])
            found[0] += row["false"] - row["missed"]
            found[1] += row["false"]
    return recall, {fault: hits / total for fault, (hits, total) in caught.items()}


def test_right_composites_pass_and_spoilt_ones_are_caught(composites: list[Case]) -> None:
    recall, caught = _totals(composites)
    assert recall >= 0.95
    assert set(caught) == {"no_op", "spill", "wrong_object", "wrong_place", "wrong_value"}
    assert caught["no_op"] == 1.0 and min(caught.values()) >= 0.9, caught


def test_without_masks_the_place_can_no_longer_be_told_but_nothing_done_still_can(composites: list[Case]) -> None:
    recall, caught = _totals(composites, masks=False)
    assert recall >= 0.95 and caught["no_op"] >= 0.9
    assert caught["wrong_object"] < 0.9  # the negative control: what needs the mask is missed without it


def test_scenes_and_exact_operations_reach_their_floors() -> None:
    recall, caught = _totals(list(scene_truth(120, SEED)))
    assert recall >= 0.97 and caught["no_op"] == 1.0 and caught["over_edit"] >= 0.98
    recall, caught = _totals([case for case in exact_truth(truth_photos(4, SEED)) if case.edit_type not in ("mirror", "flip", "rotate", "zoom")])
    assert recall >= 0.95 and caught["no_op"] == 1.0 and caught["wrong_value"] >= 0.95 and caught["over_edit"] >= 0.95


def test_the_report_has_a_row_per_type_with_wilson_intervals(composites: list[Case]) -> None:
    rows = report_of([case for case in composites if case.edit_type == "add"])
    head, *faults = rows
    assert head["edit_type"] == "add" and head["true"] == 8 and head["false"] == sum(row["false"] for row in faults)
    assert head["recall"] == 1.0 and head["recall_low"] == pytest.approx(8 / (8 + 1.959964**2)) and head["recall_high"] == 1.0


# --- the operator ----------------------------------------------------------------------------------------------------


def _rows(cases: list[Case], **columns: list) -> pa.Table:
    given = {
        "edit_id": [f"{number}" for number in range(len(cases))], "instruction": [case.instruction for case in cases],
        "edit_type": [case.edit_type for case in cases], "origin": [case.origin for case in cases],
        "source_bytes": [encode_png(case.source) for case in cases], "target_bytes": [encode_png(case.target) for case in cases],
        "mask_png": pa.array([encode_mask(case.mask) if case.mask is not None else None for case in cases], pa.binary()),
        "source_scene": pa.nulls(len(cases), pa.string()), "given_json": pa.nulls(len(cases), pa.string()),
    }  # fmt: skip
    return pa.table(given | columns)


def test_each_row_says_which_condition_broke_and_what_was_not_looked_at(composites: list[Case]) -> None:
    adds = [case for case in composites if case.edit_type == "add"][:5]
    assert [case.fault for case in adds] == ["", "no_op", "spill", "wrong_object", "wrong_place"]
    right, no_op, spill, _, wrong_place = VerifyTriplet()(_rows(adds)).to_pylist()
    assert right["verdict"] == "pass" and right["failed"] == [] and right["rule"] == "object/add"
    assert right["not_evaluated"] == ["clip_target", "object_in_target"]
    assert no_op["verdict"] == "fail" and any(reason.startswith("inside_fraction 0.0") for reason in no_op["failed"])
    assert spill["outside_change"] > right["outside_change"] and spill["verdict"] == "fail"
    assert wrong_place["verdict"] == "fail" and any(reason.startswith("outside_fraction") for reason in wrong_place["failed"])
    maskless = VerifyTriplet()(_rows(adds[:1], mask_png=pa.nulls(1, pa.binary()))).to_pylist()[0]
    assert maskless["verdict"] == "pass" and {"inside_fraction", "outside_fraction"} <= set(maskless["not_evaluated"])


def test_measures_that_other_operators_took_are_held_to_their_conditions(composites: list[Case]) -> None:
    case = [case for case in composites if case.edit_type == "add" and not case.fault][0]
    given = [json.dumps({"clip_target": value, "object_in_target": 1}) for value in (0.31, 0.05)]
    good, bad = VerifyTriplet()(_rows([case, case], given_json=given)).to_pylist()
    assert good["verdict"] == "pass" and good["not_evaluated"] == []
    assert bad["verdict"] == "fail" and bad["failed"] == ["clip_target 0.0500 < 0.2000"]


def test_the_mask_of_a_scene_follows_from_its_reading() -> None:
    rng = np.random.default_rng(SEED)
    scene = scenes.sample_scene(rng, 2)
    edit = scenes.sample_edit(scene, rng, "recolour")
    words, source = scenes.instruction(edit, scene), scenes.render(scene)
    other = next(item for item in scene.objects if item != edit.before)
    swapped = scenes.render(scenes.apply_edit(scene, scenes.Edit("remove", before=other)))
    cases = [Case("scenes_a", "recolour", words, source, target) for target in (scenes.render(scenes.apply_edit(scene, edit)), swapped)]
    right, wrong = VerifyTriplet()(_rows(cases, source_scene=[scene.to_json()] * 2)).to_pylist()
    assert right["verdict"] == "pass" and "inside_fraction" not in right["not_evaluated"]
    assert wrong["verdict"] == "fail" and any(reason.startswith("inside_fraction") for reason in wrong["failed"])


def test_bad_rows_and_sizes_are_results() -> None:
    grey, small = np.full((64, 64, 3), 90, np.uint8), np.full((32, 64, 3), 90, np.uint8)
    cases = [Case("own", "add", "add a cup", grey, small), Case("own", "never heard of", "do it", grey, 255 - grey),
             Case("own", "add", "add a cup", grey, grey, mask=np.ones((8, 8), bool))]  # fmt: skip
    sizes, unmapped, bad_mask = VerifyTriplet()(_rows(cases)).to_pylist()
    assert sizes["verdict"] == "fail" and sizes["failed"] == ["size 64x64 -> 64x32"] and sizes["error"] is None
    assert (unmapped["rule"], unmapped["verdict"]) == ("any", "pass")
    assert "the mask has 8 x 8 px" in bad_mask["error"] and bad_mask["verdict"] is None


# --- the rules -------------------------------------------------------------------------------------------------------


def test_a_required_measure_that_is_absent_leaves_the_triplet_undecided() -> None:
    rules = load_rules()
    kind = EditType("object", "add")
    whole = dict.fromkeys(rules.measures(kind), float("nan")) | {"clear_fraction": 0.05}
    assert rules.judge(kind, whole).verdict == "pass"
    assert rules.judge(kind, whole | {"clear_fraction": None}).verdict == "not_evaluated"
    assert rules.judge(kind, whole | {"clear_fraction": None, "inside_fraction": 0.0}).verdict == "fail"
    assert {rules.name_for(EditType(level1, level2)) for level1, names in load_taxonomy().levels.items() for level2 in names} == set(rules.conditions)


@pytest.mark.parametrize(("text", "message"), [
    ("sets: {}\nrules: {object/addd: [{measure: a, min: 1, required: true}]}", "'object/addd' is no type of taxonomy.yaml"),
    ("sets: {}\nrules: {any: [{measure: a, min: 1}]}", "any has no required condition"),
    ("sets: {}\nrules: {any: [{measure: a, minimum: 1, required: true}]}", "it wants measure, min and/or max in order"),
    ("sets: {}\nrules: {any: [{measure: a, min: 2, max: 1, required: true}]}", "it wants measure, min and/or max in order"),
    ("sets: {}\nrules: {any: [locale]}", "uses the set 'locale'"),
    ("sets: {}\nrules: {object: [{measure: a, min: 1, required: true}]}", "has no rule 'any'"),
])  # fmt: skip
def test_broken_rules_are_refused(text: str, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        read_rules(text)


def test_measures_of_change() -> None:
    changed = np.zeros((256, 256), bool)
    changed[10:30, 10:30] = changed[100:140, 100:140] = True
    changed[200, 200] = True  # noise
    mask = estimated_mask(changed)
    assert regions(mask) == 2 and mask[10:30, 10:30].all() and not mask[200, 200] and mask[5, 20] and not mask[45, 20]
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert similarity_map(photo, photo) == pytest.approx(1, abs=1e-4)
    assert similarity_map(photo, np.roll(photo, 20, axis=0)).mean() < 0.3
