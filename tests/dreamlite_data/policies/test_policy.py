"""Policies say which rows are in, why others are not and by how much, and refuse answers that cannot be meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dreamlite_data import executors, refresh
from dreamlite_data.lake import Lake
from dreamlite_data.policies import PolicyError, read_policy
from dreamlite_data.policies.curate import DATASETS, CurationError, _refuse_surprises, curate, judge
from tests.dreamlite_data.sources.tables import settings_of

COLUMNS = (
    "SELECT CAST(n AS VARCHAR) AS row_id, 'generate' AS task, 'i' || n AS image_id, CAST(NULL AS VARCHAR) AS source_image_id, 't' AS text, "
    "CAST(NULL AS VARCHAR) AS edit_type, CAST(NULL AS FLOAT) AS edited_fraction, CAST(NULL AS BLOB) AS edit_mask, "
    "CAST(1 AS FLOAT) AS weight, 'i' || n AS group_id, n, CASE WHEN n = 7 THEN NULL ELSE n / 10 END AS measure FROM range(100) t(n)"
)


def _policy(rules: str):
    return read_policy("trial", f"-- @candidates\n{COLUMNS}\n{rules}")


def test_every_packaged_policy_can_be_read() -> None:
    for name in DATASETS:
        policy = read_policy(name)
        assert policy.rules and policy.candidates.upper().startswith(("SELECT", "WITH"))


def test_the_first_failing_rule_its_margin_and_all_failing_rules_are_kept(lake: Lake) -> None:
    policy = _policy("-- @rule odd\nn % 2 = 1\n-- @rule high margin\nmeasure - $least")
    rows, outcome = judge(lake, policy, {"least": 2.0})
    found = {row["row_id"]: row for row in rows.to_pylist()}
    assert [(rule.name, reached, rejected) for rule, reached, rejected in outcome] == [("odd", 100, 50), ("high", 50, 10)]
    assert found["4"]["verdict"] == "drop" and found["4"]["first_rule"] == "odd" and found["4"]["margin"] is None
    assert found["4"]["failed"] == ["odd", "high"]
    assert found["5"]["first_rule"] == "high" and found["5"]["margin"] == pytest.approx(-1.5) and found["5"]["failed"] == ["high"]
    assert found["21"]["verdict"] == "keep" and found["21"]["failed"] == [] and found["21"]["first_rule"] is None


def test_what_was_never_measured_does_not_pass(lake: Lake) -> None:
    rows, _ = judge(lake, _policy("-- @rule any margin\nmeasure + 100\n"), {})
    assert [row["row_id"] for row in rows.to_pylist() if row["verdict"] == "drop"] == ["7"]


@pytest.mark.parametrize(("rules", "said"), [
    ("-- @rule all\nn >= 0", "rule trial.all rejected none of 100"),
    ("-- @rule none\nn < 0", "rule trial.none rejected all 100"),
    ("-- @rule none allow=reject_all\nn < 0\n-- @rule next\nn > 5", "rule trial.next was never evaluated"),
])  # fmt: skip
def test_a_unanimous_rule_is_an_error_unless_allowed(lake: Lake, rules: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreamlite_data.policies.curate.PASS_ALL_ROWS", 100)
    policy = _policy(rules)
    rows, outcome = judge(lake, policy, {})
    with pytest.raises(CurationError, match=said) as error:
        _refuse_surprises(policy, outcome, len(rows), {})
    assert "allow_unanimous" in str(error.value)
    for allowed in (("*",), (f"trial.{policy.rules[-1].name}",)):
        _refuse_surprises(policy, outcome, len(rows), {"allow_unanimous": allowed})
    few = [(rule, reached // 10, rejected // 10) for rule, reached, rejected in outcome]
    _refuse_surprises(policy, few, len(rows) // 10, {})  # too few rows to be surprised


def test_a_rule_can_be_switched_off(lake: Lake) -> None:
    policy = _policy("-- @rule odd when=strict\nn % 2 = 1\n-- @rule high\nn > 3")
    assert [rule.name for rule in policy.active({"strict": False})] == ["high"]
    assert policy.digest({"strict": False}) != policy.digest({"strict": True})
    assert len(judge(lake, policy, {"strict": True})[1]) == 2


@pytest.mark.parametrize(("text", "said"), [
    ("-- @rule a\n1 = 1", "needs one '-- @candidates'"),
    ("-- @candidates\nSELECT 1", "at least one '-- @rule"),
    ("-- @candidates\nSELECT 1\n-- @rule a\n-- @rule b\n1 = 1", "the block '-- @rule a' is empty"),
    ("-- @candidates\nSELECT 1\n-- @rule a fast\n1 = 1", "option 'fast'"),
    ("-- @candidates\nSELECT 1\n-- @rule a allow=some\n1 = 1", "option 'allow=some'"),
    ("-- @candidates\nSELECT 1\n-- @rule a\n1 = 1\n-- @rule a\n1 = 1", "share a name"),
    ("-- @candidates\nSELECT 1\n-- @rules a\n1 = 1", "neither"),
])  # fmt: skip
def test_a_malformed_policy_says_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        read_policy("trial", text)


def test_an_unknown_parameter_and_a_missing_column_are_named(lake: Lake) -> None:
    with pytest.raises(CurationError, match=r"\$nobody"):
        judge(lake, _policy("-- @rule a\nn > $nobody"), {})
    with pytest.raises(CurationError, match="lack the columns task"):
        judge(lake, read_policy("trial", "-- @candidates\nSELECT 'x' AS row_id\n-- @rule a\n1 = 1"), {})


def test_a_lake_without_rows_makes_no_datasets(lake: Lake) -> None:
    from dreamlite_data.settings import PolicySettings

    assert curate(lake, PolicySettings().model_dump() | {"sources": [], "seed": "0"}) == []


def test_of_a_picture_that_came_twice_the_copy_with_words_stays(lake: Lake, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    picture = Image.linear_gradient("L").resize((96, 96)).convert("RGB")
    picture.paste((200, 30, 40), (20, 20, 60, 60))
    picture.save(folder / "a_without_words.png", compress_level=1)
    picture.save(folder / "b.png")
    (folder / "b.txt").write_text("a red square")
    settings = settings_of(
        {"name": "own", "kind": "folder", "path": folder}, policy={"require_scene_language": False, "min_sharpness": 0.0, "allow_unanimous": ["*"]}
    )
    refresh.ingest(lake, settings, executors.local())
    refresh.measure(lake, settings, executors.local(), ["quality", "duplicates", "caption"])
    refresh.curate(lake, settings, 0)
    assert lake.query("SELECT count(DISTINCT group_id) AS n FROM current_duplicates")["n"].to_pylist() == [1], "they are one picture"
    assert lake.query("SELECT row_id FROM dataset_rows WHERE name = 't2i'")["row_id"].to_pylist() == ["own/b.png"]
