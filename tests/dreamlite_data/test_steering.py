"""Quotas that steer, in a lake: the mix of what is made moves to the shares, resumes with the same plan, and costs nothing when done."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from dreamlite_data import executors, refresh, steering
from dreamlite_data.lake import Lake
from dreamlite_data.operators.edit_plan import EditPlan
from dreamlite_data.settings import RefreshSettings
from tests.dreamlite_data.conftest import contents

QUOTAS = {"steer": True, "shares": {"object": 0.5, "low_level": 0.3, "camera": 0.1, "style": 0.1}}
OWN = {
    "scenes": {"t2i_rows": 0, "edit_rows": 0}, "photos": {"max_px": 80, "edits_per_image": 2}, "composite": {"per_image": 2},
    "policy": {"allow_unanimous": ["*"]},
}  # fmt: skip
PLANNED = ["op_edit_plan", "op_edit", "edits", "instructions", "images", "edit_masks"]


def _settings(**changes: object) -> RefreshSettings:
    return RefreshSettings(**{**OWN, "quotas": QUOTAS, **changes})


def _keep(lake: Lake, count: int) -> None:
    """Leave so many of the photos in their folder."""
    files = sorted((lake.files / "sources" / "photos_80").iterdir())
    names = sorted({file.stem for file in files})[:count]
    for file in files:
        if file.stem not in names:
            file.unlink()


def _ingested(root: Path, settings: RefreshSettings, count: int = 16) -> Lake:
    lake = Lake(root)
    refresh.write_sources(lake, settings, 0)
    _keep(lake, count)
    refresh.ingest(lake, settings, executors.local())
    return lake


def _level1(lake: Lake) -> Counter[str]:
    return Counter(lake.query("SELECT level1 FROM edit_types WHERE NOT rejected")["level1"].to_pylist())


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    lake = _ingested(tmp_path_factory.mktemp("steered"), _settings())
    with pytest.warns(UserWarning, match="no route that is on makes edits for the quotas style"):
        answer = refresh.measure(lake, _settings(), executors.local(), ["edit"])
    assert answer["edit_plan_cannot"] == "style" and answer["edit_plan_rows"] >= 6
    return lake


def test_the_mix_in_the_lake_follows_the_shares(steered: Lake) -> None:
    counts = _level1(steered)
    assert set(counts) == {"object", "low_level", "camera"}
    for level1, share in (("object", 5), ("low_level", 3), ("camera", 1)):
        assert counts[level1] / counts.total() == pytest.approx(share / 9, abs=0.06), counts
    asked = steered.query("SELECT CAST(sum(len(exact) + len(composite)) AS INT) AS n FROM op_edit_plan")["n"][0].as_py()
    made = steered.query("SELECT CAST(sum(edits) AS INT) AS n FROM op_edit")["n"][0].as_py()
    assert 0.95 * asked < made <= asked


def test_a_second_run_plans_nothing_and_makes_nothing(steered: Lake) -> None:
    snapshot = steered.snapshot()
    answer = refresh.measure(steered, _settings(), executors.local(), ["edit"])
    assert {value for value in answer.values() if not isinstance(value, str)} == {0} and steered.snapshot() == snapshot


@pytest.mark.thorough
@pytest.mark.slow
def test_a_run_cut_off_after_the_plan_or_within_it_ends_like_one_that_was_not(steered: Lake, tmp_path: Path) -> None:
    settings = _settings(ingest={"rows_per_task": 3})
    lake = _ingested(tmp_path / "lake", settings)
    refresh.record_taxonomy(lake)
    with pytest.warns(UserWarning, match="style"):
        steering.plan_edits(lake, settings)
    commits = []

    class Dies(executors.LocalExecutor):
        def map(self, function, tasks, resources=None):
            for result in super().map(function, tasks, resources):
                commits.append(result)
                if len(commits) == 2:
                    raise KeyboardInterrupt
                yield result

    with pytest.raises(KeyboardInterrupt):
        refresh.measure(lake, settings, Dies(1), ["edit"])
    with executors.local(2) as two:
        refresh.measure(lake, settings, two, ["edit"])
    assert contents(lake, PLANNED) == contents(steered, PLANNED)


def _kinds(rows: Iterable[dict]) -> Counter[str]:
    return Counter(kind for row in rows for kind in row["exact"] + row["composite"])


def test_a_plan_starts_from_what_was_made_and_what_is_planned(steered: Lake, tmp_path: Path) -> None:
    version = steered.query("SELECT op_version FROM current_versions WHERE name = 'edit_plan'")["op_version"][0].as_py()
    made = Counter(f"{row['level1']}/{row['level2']}" for row in steered.query("SELECT * FROM edit_types WHERE NOT rejected").to_pylist())
    assert {str(kind): count for kind, count in steering.held_types(steered, _settings(), version).items()} == made
    settings = _settings(quotas={"steer": True, "shares": {"object": 0.4, "low_level": 0.4, "camera": 0.2}})
    lake = _ingested(tmp_path / "lake", settings, 6)
    refresh.record_taxonomy(lake)
    steering.plan_edits(lake, settings)
    before = {row["subject_id"]: row for row in lake.query("SELECT * FROM op_edit_plan").to_pylist()}
    version = next(iter(before.values()))["op_version"]
    held = steering.held_types(lake, settings, version)
    assert {str(kind): count for kind, count in held.items()} == _kinds(before.values())
    shutil.rmtree(lake.files / "sources" / "photos_80")
    refresh.write_sources(lake, settings, 0)
    _keep(lake, 14)
    refresh.ingest(lake, settings, executors.local())
    steering.plan_edits(lake, settings)
    after = {row["subject_id"]: row for row in lake.query("SELECT * FROM op_edit_plan").to_pylist()}
    assert len(after) >= len(before) + 4 and {name: after[name] for name in before} == before
    fresh = [name for name in after if name not in before]
    rows = EditPlan.of(settings)(fresh, held)
    assert [{**row, "op_version": version, "error": None} for row in rows] == [after[name] for name in sorted(fresh)]
    assert rows != EditPlan.of(settings)(fresh, {})  # without what is planned, the same pictures would be asked for other things


def test_steering_that_has_nothing_to_steer_is_refused() -> None:
    with pytest.raises(ValueError, match="refresh.quotas.steer has nothing to steer"):
        RefreshSettings(photos={"edits_per_image": 0}, quotas={"steer": True})
    with pytest.raises(ValueError, match="both a mix and shares"):
        RefreshSettings(quotas={"mix": "another", "shares": {"object": 1.0}})
    with pytest.raises(ValueError, match="did you mean 'object'"):
        RefreshSettings(quotas={"shares": {"objekt": 1.0}})
