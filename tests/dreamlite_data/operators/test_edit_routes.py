"""Routes end to end in a lake: composites and pairs become verified rows of the datasets, resume, and go when switched off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamlite_data import executors, refresh
from dreamlite_data.dataset import open_dataset
from dreamlite_data.lake import Lake
from dreamlite_data.operators.instruction import JOINT
from dreamlite_data.settings import RefreshSettings
from tests.dreamlite_data.conftest import build, contents

ON = {
    "scenes": {"t2i_rows": 0, "edit_rows": 28, "shard_rows": 28, "fault_share": 0.1},
    "photos": {"max_px": 96, "edits_per_image": 1, "inverse_edits": True},
    "composite": {"per_image": 2},
    "edit_pairs": {"inverse": True, "composed": True},
    "policy": {"allow_unanimous": ["*"], "heldout_share": 0.3},
}


@pytest.fixture(scope="module")
def widened(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    lake = Lake(tmp_path_factory.mktemp("widened"))
    build(lake, RefreshSettings(**ON))
    return lake


def test_photos_give_exact_and_composite_triplets_that_pass_their_rules(widened: Lake) -> None:
    rows = widened.query("SELECT * FROM edit_records WHERE route IN ('exact', 'composite')").to_pylist()
    composites = [row for row in rows if row["route"] == "composite"]
    assert len(composites) > 50 and {row["relation"] for row in rows} == {"", "inverse"}
    assert all(row["matches"] for row in rows if row["route"] == "exact")
    passed = sum(row["triplet_verdict"] == "pass" for row in composites) / len(composites)
    assert passed > 0.9
    kept = set(open_dataset(widened, "photo_edits").rows["row_id"].to_pylist())
    assert {row["triplet_verdict"] for row in composites if row["row_id"] in kept} == {"pass"}
    dropped = widened.query("SELECT DISTINCT rule FROM why_dropped WHERE dataset = 'photo_edits'")["rule"].to_pylist()
    assert set(dropped) <= {"unique_triplet", "sharp", "something_changed", "passes_triplet_rules", "large_enough"}
    masks = widened.query("SELECT count(*) AS n FROM edit_masks SEMI JOIN made_edits USING (edit_id)")["n"][0].as_py()
    assert masks == len(composites)


def test_pairs_of_the_small_world_are_verified_like_any_edit_and_stay_in_the_split_of_their_source(widened: Lake) -> None:
    rows = widened.query("SELECT * FROM edit_records WHERE route = 'scene_graph'").to_pylist()
    inverse, composed = ([row for row in rows if row["relation"] == relation] for relation in ("inverse", "composed"))
    assert len(inverse) > 15 and len(composed) > 4
    assert all(row["matches"] for row in rows), [row["reason"] for row in rows if not row["matches"]][:3]
    assert all(JOINT in row["text"] for row in composed) and not any(JOINT in row["text"] for row in inverse)
    dataset = open_dataset(widened, "edit").rows.to_pylist()
    assert {row["row_id"] for row in rows} & {row["row_id"] for row in dataset}
    splits: dict[str, set[str]] = {}
    bases = {row["row_id"]: row["group_id"] for row in widened.query("SELECT row_id, group_id FROM edit_records").to_pylist()}
    for row in dataset:
        splits.setdefault(bases[row["row_id"]], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values()) and {split for found in splits.values() for split in found} == {"train", "heldout"}


def test_wrong_edits_have_no_pairs(widened: Lake) -> None:
    wrong = widened.query("SELECT edit_id FROM edit_records WHERE route = 'provider' AND error IS NULL AND NOT matches")["edit_id"].to_pylist()
    parents = widened.query("SELECT parent_edit_id FROM edits WHERE route = 'scene_graph'")["parent_edit_id"].to_pylist()
    assert wrong and not set(wrong) & set(parents)


def test_every_triplet_has_a_type_and_the_rules_say_what_they_did_not_evaluate(widened: Lake) -> None:
    types = widened.query_read_only("SELECT level1, count(*) AS n FROM edit_types GROUP BY level1").to_pylist()
    assert {row["level1"] for row in types} >= {"object", "attribute", "composite"} and "unmapped" not in {row["level1"] for row in types}
    coverage = {row["rule"]: row for row in widened.query_read_only("SELECT * FROM rule_coverage").to_pylist()}
    assert "clip_target" in coverage["object/add"]["not_evaluated"] and coverage["object/add"]["partly_evaluated"] > 0
    plan = " ".join(widened.query_read_only("EXPLAIN SELECT * FROM edit_types")["explain_value"].to_pylist())
    assert "bytes" not in plan and "mask_png" not in plan


@pytest.mark.thorough
@pytest.mark.slow
def test_a_second_refresh_does_nothing_and_smaller_tasks_in_two_processes_give_the_same(widened: Lake, tmp_path: Path) -> None:
    settings = RefreshSettings(**ON)
    snapshot = widened.snapshot()
    for names in (["quality"], ["edit", "caption"], ["verify"]):
        assert set(refresh.measure(widened, settings, executors.local(), names).values()) == {0}
    assert widened.snapshot() == snapshot
    other = Lake(tmp_path)
    with executors.local(2) as executor:
        build(other, RefreshSettings(**ON, ingest={"rows_per_task": 9}), executor)
    assert contents(other) == contents(widened)


@pytest.mark.thorough
def test_a_route_that_is_switched_off_leaves_the_views_and_comes_back_without_work(tmp_path: Path) -> None:
    stamps = tmp_path / "stamps"
    stamps.mkdir()
    for name, colour in (("cup", (200, 40, 40)), ("hat", (40, 40, 200)), ("key", (40, 160, 40))):
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[8:56, 16:48] = (*colour, 255)
        Image.fromarray(pixels).save(stamps / f"{name}.png")
    own = {"scenes": {"t2i_rows": 0, "edit_rows": 0}, "photos": {"max_px": 80, "edits_per_image": 0}, "policy": {"allow_unanimous": ["*"]}}
    on = RefreshSettings(**own, composite={"per_image": 1, "cutouts": stamps})
    off = RefreshSettings(**own)
    lake, executor = Lake(tmp_path / "lake"), executors.local()
    refresh.write_sources(lake, on, 0)
    refresh.ingest(lake, on, executor)
    made = refresh.measure(lake, on, executor, ["edit"])
    count = "SELECT count(*) AS n FROM edit_records"
    before = lake.query(count)["n"][0].as_py()
    assert made["edit_composite_rows"] > 5 and before >= made["edit_composite_rows"]
    refresh.measure(lake, off, executor, ["edit"])
    assert lake.query(count)["n"][0].as_py() == 0
    again = refresh.measure(lake, on, executor, ["edit"])
    assert again["edit_composite_rows"] == 0 and lake.query(count)["n"][0].as_py() == before
    (stamps / "cup.png").unlink()
    assert refresh.measure(lake, on, executor, ["edit"])["edit_composite_rows"] == made["edit_composite_rows"]  # other cut-outs, other edits
