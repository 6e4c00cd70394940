"""A refresh does what is pending and nothing else, gives the same rows however it ran, and remembers every verdict."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.compute as pc
import pytest

from dreamlite_data import executors, images, refresh
from dreamlite_data.dataset import DatasetError, open_dataset, read_images
from dreamlite_data.faults import fault_report
from dreamlite_data.lake import Lake
from dreamlite_data.settings import RefreshSettings
from tests.dreamlite_data.conftest import build, contents, small_settings

REWARDS = Path(__file__).parent / "rewards" / "fixtures"


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_filters_find_the_planted_faults(built: Lake, settings: RefreshSettings) -> None:
    report = {row["fault"]: row for row in fault_report(built, settings)}
    assert sum(row["planted"] for row in report.values()) > 30
    for fault, row in report.items():
        assert row["planted"] > 0 and row["recall"] == 1.0, fault
        assert row["false_positives"] == 0, fault


@pytest.mark.thorough
def test_a_filter_with_a_bad_threshold_shows_in_the_report(tmp_path: Path) -> None:
    settings = small_settings(photos={"enabled": False}, policy={"min_sharpness": 0.8, "allow_unanimous": ["*"]})
    lake = Lake(tmp_path)
    build(lake, settings)
    blurred = next(row for row in fault_report(lake, settings) if row["fault"] == "blurred")
    assert blurred["false_positives"] > 0 and blurred["precision"] < 1.0


def test_the_funnel_adds_up_and_ends_at_the_dataset(built: Lake) -> None:
    rows = refresh.funnel(built).to_pylist()
    for name in {row["dataset"] for row in rows}:
        steps = [row for row in rows if row["dataset"] == name]
        assert steps == sorted(steps, key=lambda row: row["position"])
        for before, after in zip(steps, steps[1:], strict=False):
            assert before["rows_out"] == after["rows_in"]
        assert all(row["rows_in"] - row["rejected"] == row["rows_out"] for row in steps)
        assert steps[-1]["rows_out"] == len(open_dataset(built, name))
    t2i = [row for row in rows if row["dataset"] == "t2i"]
    assert t2i[0]["rows_in"] == built.query("SELECT count(*) AS n FROM decisions WHERE dataset = 't2i'")["n"][0].as_py()


def test_every_dropped_row_says_which_rule_and_by_how_much(built: Lake) -> None:
    rows = built.query_read_only("SELECT dataset, rule, margin, failed FROM why_dropped").to_pylist()
    assert rows and all(row["rule"] == row["failed"][0] for row in rows)
    sharp = [row for row in rows if row["rule"] == "sharp"]
    assert sharp and all(row["margin"] is None or row["margin"] < 0 for row in sharp)


@pytest.mark.parametrize("view", ["samples", "triplets", "funnel", "why_dropped", "duplicates", "lineage_of('t2i@1')"])
def test_the_views_for_people_read_no_image_bytes(built: Lake, view: str) -> None:
    plan = " ".join(built.query_read_only(f"EXPLAIN SELECT * FROM {view}")["explain_value"].to_pylist())
    assert "bytes" not in plan
    assert "bytes" in " ".join(built.query_read_only("EXPLAIN SELECT bytes FROM images")["explain_value"].to_pylist())
    built.query_read_only(f"SELECT * FROM {view}")


def test_photos_are_their_own_dataset_and_leave_the_others_by_a_named_rule(built: Lake) -> None:
    photos = open_dataset(built, "photos").rows["row_id"].to_pylist()
    assert len(photos) > 5 and all(row_id.startswith("photos_96/") for row_id in photos)
    assert not any(row_id.startswith("photos") for row_id in open_dataset(built, "t2i").rows["row_id"].to_pylist())
    rules = built.query("SELECT DISTINCT rule FROM why_dropped WHERE dataset = 't2i' AND row_id LIKE 'photos%'")["rule"].to_pylist()
    assert "in_caption_language" in rules
    edits = open_dataset(built, "photo_edits").require(["source_image_id", "edited_fraction", "edit_type"])
    assert len(edits) > 5


def test_a_wrong_caption_goes_and_the_captioners_stands_in(built: Lake) -> None:
    wrong = "SELECT row_id FROM why_dropped WHERE dataset = 't2i' AND rule = 'caption_matches_image'"
    rows = set(built.query(wrong)["row_id"].to_pylist())
    kept = set(open_dataset(built, "t2i").rows["row_id"].to_pylist())
    assert rows and not rows & kept
    assert {f"{row_id}#scene" for row_id in rows} <= kept


# --- datasets --------------------------------------------------------------------------------------------------------


def test_a_dataset_holds_what_trainers_need(built: Lake) -> None:
    edit = open_dataset(built, "edit").require(["text", "source_image_id", "edited_fraction", "edit_mask", "edit_type"])
    assert {len(mask) for mask in edit.rows["edit_mask"].to_pylist()} == {64}
    t2i = open_dataset(built, "t2i").require(["text", "image_id", "weight", "split"])
    with pytest.raises(DatasetError, match="t2i@1: .* have no edit_type"):
        t2i.require(["edit_type"])
    with pytest.raises(DatasetError, match="no column 'caption'"):
        t2i.require(["caption"])
    with pytest.raises(DatasetError, match="no rows of task edit"):
        t2i.require(["text"], task="edit")
    ids = [*edit.rows["image_id"].to_pylist(), *edit.rows["source_image_id"].to_pylist()]
    assert set(read_images(built, ids)) == set(ids)
    with pytest.raises(DatasetError, match="1 of 2 images are not in the lake"):
        read_images(built, [ids[0], "absent"])


def test_a_dataset_that_is_not_there_is_refused_with_what_there_is(built: Lake) -> None:
    with pytest.raises(DatasetError, match="no dataset 't21'; it has edit, photo_edits, photos, rl, t2i"):
        open_dataset(built, "t21")
    with pytest.raises(DatasetError, match="no version 9; it has 1"):
        open_dataset(built, "t2i", 9)


@pytest.mark.thorough
def test_all_rows_of_one_source_image_land_in_one_split(tmp_path: Path) -> None:
    settings = small_settings(photos={"enabled": False}, policy={"heldout_share": 0.4, "allow_unanimous": ["*"]})
    lake = Lake(tmp_path)
    build(lake, settings)
    shared = lake.query(
        "SELECT source_image_id, count(*) AS n, count(DISTINCT split) AS splits FROM dataset_rows WHERE name = 'edit' GROUP BY ALL HAVING n > 1"
    ).to_pylist()
    assert len(shared) > 5 and {row["splits"] for row in shared} == {1}
    assert set(open_dataset(lake, "edit").rows["split"].to_pylist()) == {"train", "heldout"}
    across = lake.query("SELECT row_id FROM dataset_rows GROUP BY row_id HAVING count(DISTINCT split) > 1")
    assert len(across) == 0  # a held-out row is held out of every dataset


# --- pending is a query ----------------------------------------------------------------------------------------------


def test_a_refresh_with_nothing_new_reads_no_pixel_and_starts_no_worker(
    built: Lake, settings: RefreshSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is pending, so nothing may be decoded, read or run")

    snapshot = built.snapshot()
    for module in ("ingest.images.decode", "quality.decode_stored", "caption.decode_stored", "verify.decode_stored", "edit.decode_stored",
                   "base.fetch", "base.run_task"):  # fmt: skip
        monkeypatch.setattr(f"dreamlite_data.operators.{module}", refuse)
    for executor in (executors.local(2), executors.ray(2)):
        refresh.write_sources(built, settings, 0)
        counts = refresh.ingest(built, settings, executor)
        assert counts["pending"] == counts["records"] == 0
        for names in (["quality", "edit", "caption", "verify"],):
            counts = refresh.measure(built, settings, executor, names)
            assert set(counts.values()) == {0}
        assert executor.started == 0
    versions = refresh.curate(built, settings, 0)
    assert {row["version"] for row in versions} == {1}
    assert built.snapshot() == snapshot  # not even an empty commit


def test_the_counting_of_decodes_is_no_accident(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = images.decode
    monkeypatch.setattr("dreamlite_data.operators.ingest.images.decode", lambda *a: seen.append(1) or real(*a))
    settings = small_settings(photos={"enabled": False}, scenes={"t2i_rows": 10, "edit_rows": 0, "fault_share": 0.0})
    refresh.write_sources(lake, settings, 0)
    refresh.ingest(lake, settings, executors.local())
    assert len(seen) == 10


def test_a_changed_threshold_is_a_new_version_and_no_measurement(tmp_path: Path) -> None:
    lake, settings = Lake(tmp_path), small_settings(photos={"enabled": False})
    first = {row["name"]: row for row in build(lake, settings)}
    measured = contents(lake, ["op_quality", "op_caption", "op_verify_caption", "op_verify_edit", "operator_versions"])
    stricter = small_settings(photos={"enabled": False}, policy={"min_sharpness": 0.75})
    second = {row["name"]: row for row in build(lake, stricter)}
    assert second["t2i"]["version"] == 2 and second["t2i"]["rows"] < first["t2i"]["rows"]
    assert contents(lake, list(measured)) == measured
    assert len(open_dataset(lake, "t2i", 1)) == first["t2i"]["rows"]  # the old version stands
    assert lake.query("SELECT parent FROM datasets WHERE name = 't2i' AND version = 2")["parent"].to_pylist() == [1]
    third = {row["name"]: row for row in build(lake, settings)}
    assert third["t2i"]["version"] == 3 and third["t2i"]["digest"] == first["t2i"]["digest"]


@pytest.mark.thorough
def test_new_rows_that_are_all_dropped_leave_their_verdicts_but_no_new_version(lake: Lake, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    settings = small_settings(photos={"enabled": False}, extra_sources=({"name": "own", "kind": "folder", "path": folder},))
    first = build(lake, settings)
    (folder / "broken.png").write_bytes(b"no image")
    assert build(lake, settings) == first
    rows = lake.query("SELECT rule FROM why_dropped WHERE row_id = 'own/broken.png'")["rule"].to_pylist()
    assert rows == ["ingested"]


# --- equal however it ran --------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_two_processes_give_the_rows_of_one(built: Lake, settings: RefreshSettings, tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    with executors.local(2) as executor:
        build(lake, settings, executor)
        assert executor.started == 1
    assert contents(lake) == contents(built)


@pytest.mark.thorough
def test_smaller_tasks_give_the_same_rows(built: Lake, settings: RefreshSettings, tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    build(lake, small_settings(ingest={"rows_per_task": 37, "folder_files_per_task": 5}))
    assert contents(lake) == contents(built)


@pytest.mark.thorough
@pytest.mark.slow
def test_ray_gives_the_rows_of_one_process(built: Lake, settings: RefreshSettings, tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    with executors.ray(2) as executor:
        build(lake, settings, executor)
        assert executor.started == 1
    assert contents(lake) == contents(built)


KILLED = """
import sys
from dreamlite_data import executors, refresh
from dreamlite_data.lake import Lake
from dreamlite_data.settings import RefreshSettings
settings = RefreshSettings.model_validate_json(sys.argv[2])
lake = Lake(sys.argv[1])
executor = executors.local()
refresh.ingest(lake, settings, executor)
refresh.measure(lake, settings, executor, ["quality", "edit", "caption", "verify"])
"""


@pytest.mark.thorough
@pytest.mark.parametrize(("table", "rows"), [("op_shard", 2), ("op_quality", 60), ("op_caption", 60)])
def test_a_killed_refresh_goes_on_where_it_was_and_ends_the_same(built: Lake, tmp_path: Path, table: str, rows: int) -> None:
    settings = small_settings(ingest={"rows_per_task": 16})
    lake = Lake(tmp_path)
    refresh.write_sources(lake, settings, 0)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), settings.model_dump_json()])
    deadline = time.monotonic() + 120
    while lake.count(table) < rows and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was really at work
    done = lake.count(table)
    assert done >= rows
    build(lake, settings)
    assert contents(lake) == contents(built)


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lake, RefreshSettings, dict[str, Path], dict]:
    settings = small_settings(photos={"enabled": False}, scenes={"t2i_rows": 20, "edit_rows": 14, "shard_rows": 20, "fault_share": 0.2},
                              policy={"sft_share": 0.5})  # fmt: skip
    lake = Lake(tmp_path_factory.mktemp("scored"))
    build(lake, settings)
    rewards = {"generate": REWARDS / "hpsv3_tiny", "edit": REWARDS / "editreward_tiny"}
    return lake, settings, rewards, refresh.score(lake, settings, executors.local(), rewards)


def test_verified_rows_are_scored_in_process_and_only_once(scored: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    lake, settings, rewards, counts = scored
    assert counts["generate_rows"] > 10 and counts["edit_rows"] > 6 and counts["generate_failed"] == counts["edit_failed"] == 0
    rows = lake.query("SELECT task, scorer_id, mu, log_sigma, error FROM current_scores").to_pylist()
    assert {row["task"] for row in rows} == {"generate", "edit"}
    assert all(row["mu"] is not None and row["log_sigma"] is not None and row["error"] is None for row in rows)
    monkeypatch.setattr("dreamlite_data.operators.score.reward_model", None)
    again = refresh.score(lake, settings, executors.local(), rewards)
    assert set(again.values()) == {0}


def test_sft_is_the_better_rewarded_slice_of_both_tasks(scored: tuple) -> None:
    lake, settings, _, _ = scored
    made = {row["name"]: row for row in refresh.curate(lake, settings, 0)}
    sft = open_dataset(lake, "sft").rows
    for task, parent, view in (("generate", "t2i", "t2i_records"), ("edit", "edit", "edit_records")):
        kept = set(sft.filter(pc.equal(sft["task"], task))["row_id"].to_pylist())
        reward = {row["row_id"]: row["reward"] for row in lake.query(f"SELECT row_id, reward FROM {view}").to_pylist()}
        others = set(open_dataset(lake, parent).rows["row_id"].to_pylist()) - kept
        assert 0.35 < len(kept) / (len(kept) + len(others)) < 0.65
        assert min(reward[row_id] for row_id in kept) >= max(reward[row_id] for row_id in others)
    ids = lake.query("SELECT kind, id FROM lineage_of($id)", {"id": f"sft@{made['sft']['version']}"})["id"].to_pylist()
    assert {f"t2i@{made['t2i']['version']}", f"edit@{made['edit']['version']}"} <= set(ids)


def test_a_reward_that_is_not_there_is_said_plainly(scored: tuple, tmp_path: Path) -> None:
    lake, settings, _, _ = scored
    with pytest.raises(FileNotFoundError, match="no reward model at"):
        refresh.score(lake, settings, executors.local(), {"generate": tmp_path})
    with pytest.raises(ValueError, match="no scoring task video"):
        refresh.score(lake, settings, executors.local(), {"video": tmp_path})


# --- settings --------------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(ValueError, match="unknown key 't2i_row' in ScenesSettings: did you mean 't2i_rows'"):
        RefreshSettings(scenes={"t2i_row": 5})
    with pytest.raises(ValueError, match="there is no measurement 'blur'"):
        refresh.measure(None, RefreshSettings(), executors.local(), ["blur"])
