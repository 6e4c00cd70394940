"""A capped dataset keeps no type beyond its quota, picks by score then by hash, and says of every row that goes why and by how much."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from dreamlite_data import refresh
from dreamlite_data.dataset import open_dataset
from dreamlite_data.lake import Lake
from dreamlite_data.policies import PolicyError, read_policy
from dreamlite_data.policies.curate import DATASETS, freeze, judge
from dreamlite_data.policies.trial import commit_policy, try_policy
from dreamlite_data.policies.versions import stored_rules
from dreamlite_data.settings import PolicySettings
from tests.dreamlite_data.conftest import small_settings
from tests.dreamlite_data.policies.test_trial import own  # noqa: F401  (fixture)

COLUMNS = (
    "SELECT 'r' || lpad(CAST(n AS VARCHAR), 3, '0') AS row_id, 'edit' AS task, 'i' || n AS image_id, 'j' || n AS source_image_id, 't' AS text, "
    "'x' AS edit_type, CAST(1 AS FLOAT) AS edited_fraction, CAST(NULL AS BLOB) AS edit_mask, CAST(1 AS FLOAT) AS weight, "
    "'i' || n AS group_id, n FROM range($count) t(n)"
)
TYPES = (
    "SELECT 'r' || lpad(CAST(n AS VARCHAR), 3, '0') AS row_id, CASE WHEN n % 10 < 7 THEN 'object' WHEN n % 10 < 9 THEN 'camera' END AS level1, "
    "CASE WHEN n % 10 < 7 THEN 'add' WHEN n % 10 < 9 THEN 'zoom' END AS level2{score} FROM range(1000) t(n)"
)
HALF = {"object": 0.5, "camera": 0.5}
PACKAGED = Path(refresh.__file__).parent / "policies"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """An empty lake: the candidates of these tests come from no table."""
    return Lake(tmp_path_factory.mktemp("bare"))


def _policy(score: str = ""):
    return read_policy("trial", f"-- @candidates\n{COLUMNS}\n-- @rule low\nn >= $from\n-- @quota\n{TYPES.format(score=score)}")


def _judge(lake: Lake, score: str = "", **parameters: object):
    values = {"count": 100, "from": 0, "quotas": HALF, "quota_rows": None, "heldout_share": 0.1, **parameters}
    judged, outcome = judge(lake, _policy(score), values)
    return judged.to_pylist(), outcome, values


def _kept(rows: list[dict]) -> Counter[str]:
    return Counter("object" if row["n"] % 10 < 7 else "camera" if row["n"] % 10 < 9 else "none" for row in rows if row["verdict"] == "keep")


def test_each_type_is_capped_at_its_share_of_the_rows_that_pass(bare: Lake) -> None:
    rows, outcome, _ = _judge(bare, **{"from": 20})
    assert _kept(rows) == {"object": 40, "camera": 16}  # 56 and 16 of 80 pass; a type without a share has none
    assert [(rule.name, reached, out) for rule, reached, out in outcome] == [("low", 100, 20), ("quota", 80, 24)]
    over = [row for row in rows if row["first_rule"] == "quota"]
    assert all(row["verdict"] == "drop" and row["rule_position"] == 1 and row["failed"] == ["quota"] for row in over)
    assert sorted(row["margin"] for row in over if row["n"] % 10 < 7) == [-float(n) for n in range(16, 0, -1)]
    assert {row["first_rule"] for row in rows if row["n"] < 20} == {"low"}  # a row that fails a rule says so, not that it is over


def test_a_size_of_the_whole_caps_harder_and_without_quotas_nothing_goes(bare: Lake) -> None:
    assert _kept(_judge(bare, quota_rows=20)[0]) == {"object": 10, "camera": 10}
    rows, outcome, _ = _judge(bare, quotas=None)
    assert _kept(rows) == {"object": 70, "camera": 20, "none": 10} and [rule.name for rule, _, _ in outcome] == ["low"]
    rows, outcome, _ = _judge(bare, quotas={"object": 0.9, "camera": 0.05, "unmapped": 0.05}, quota_rows=10_000)
    assert _kept(rows) == {"object": 70, "camera": 20} and outcome[-1][2] == 10


def test_the_best_stay_and_where_none_is_better_a_hash_that_new_rows_do_not_move(bare: Lake) -> None:
    rows, _, _ = _judge(bare, ", CASE WHEN n % 2 = 0 THEN CAST(n AS DOUBLE) WHEN n % 3 = 0 THEN 'nan'::DOUBLE END AS score", quota_rows=20)
    kept = [row["n"] for row in rows if row["verdict"] == "keep" and row["n"] % 10 < 7]
    assert kept == sorted(n for n in range(100) if n % 10 < 7 and n % 2 == 0)[-10:]

    def by_hash(count: int) -> set[int]:
        return {row["n"] for row in _judge(bare, quota_rows=40, count=count)[0] if row["verdict"] == "keep"}

    few, more = by_hash(100), by_hash(120)
    assert few == by_hash(100) and few != set(range(min(few), max(few) + 1))
    assert len({n for n in more if n < 100} - few) == 0  # rows of before are only displaced by new ones


def test_the_version_records_the_quotas_and_another_share_is_another_policy(bare: Lake) -> None:
    policy = _policy()
    judged, _ = judge(bare, policy, values := _judge(bare)[2])
    made = freeze(bare, policy, judged, values, [])
    assert made["rows"] == 70 == len(open_dataset(bare, "trial"))
    funnel = bare.query("SELECT rule, rows_in, rejected, rows_out FROM funnel WHERE dataset = 'trial' ORDER BY position").to_pylist()
    assert funnel[-1] == {"rule": "quota", "rows_in": 100, "rejected": 30, "rows_out": 70}
    assert bare.query("SELECT count(*) AS n FROM why_dropped WHERE rule = 'quota' AND margin < 0")["n"][0].as_py() == 30
    assert "'share'" not in stored_rules(bare, "trial")[1][0]["parameters"] and "object" in stored_rules(bare, "trial")[1][1]["parameters"]
    other = {**values, "quotas": {"object": 0.6, "camera": 0.4}}
    assert policy.digest(values) != policy.digest(other) != policy.digest({**values, "quotas": None})


def test_a_policy_without_quotas_in_force_is_the_policy_it_was() -> None:
    parameters = PolicySettings().model_dump() | {"sources": [], "seed": "0", "benchmarks": []}
    for name in DATASETS:
        text = (PACKAGED / f"{name}.sql").read_text()
        plain = read_policy(name, text.partition("-- @quota")[0])
        values = parameters | {"t2i_version": 1, "edit_version": 1, "quotas": None, "quota_rows": None}
        assert read_policy(name).digest(values) == plain.digest(values)
    assert read_policy("edit").digest({**values, "quotas": HALF}) != read_policy("edit").digest(values)


@pytest.mark.parametrize(("text", "said"), [
    ("-- @quota\nSELECT 1\n-- @quota\nSELECT 2", "two '-- @quota' blocks"),
    ("-- @quota fast\nSELECT 1", "nor '-- @quota'"),
    ("-- @rule quota\nn > 2", "a rule cannot be called 'quota'"),
])  # fmt: skip
def test_a_malformed_block_says_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        read_policy("trial", f"-- @candidates\n{COLUMNS}\n-- @rule low\nn >= 0\n{text}")


@pytest.mark.parametrize(("change", "said"), [
    ({"quotas": {"objekt": 1.0}}, "the parameter quotas: there is no edit type 'objekt'.*did you mean 'object'"),
    ({"quota_rows": 0}, "quota_rows is 0"),
    ({"quota_rows": "many"}, "quota_rows is 'many'"),
])  # fmt: skip
def test_quotas_that_cannot_be_meant_are_refused(bare: Lake, change: dict, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        _judge(bare, **change)


def test_a_block_that_says_too_little_or_too_much_is_refused(bare: Lake) -> None:
    start = f"-- @candidates\n{COLUMNS}\n-- @rule low\nn >= $from\n-- @quota\n"
    values = {"count": 10, "from": 0, "quotas": HALF}
    with pytest.raises(PolicyError, match="lacks the columns level1, level2"):
        judge(bare, read_policy("trial", start + "SELECT 'r000' AS row_id"), values)
    with pytest.raises(PolicyError, match="may name a row once only"):
        judge(bare, read_policy("trial", start + "SELECT 'r000' AS row_id, 'object' AS level1, 'add' AS level2 FROM range(2)"), values)
    with pytest.raises(PolicyError, match=r"reads \$quotas in SQL"):
        judge(bare, read_policy("trial", start + "SELECT 'r000' AS row_id, 'object' AS level1, $quotas AS level2"), values)


def test_settings_cap_the_packaged_datasets(own: Lake) -> None:  # noqa: F811
    before = len(open_dataset(own, "edit"))
    capped = small_settings(quotas={"cap": True, "shares": {"object": 0.3, "scene": 0.7}}, policy={"allow_unanimous": ["*"]})
    refresh.curate(own, capped, 0)
    rows = own.query(
        "SELECT t.level1, count(*) AS n FROM dataset_rows r JOIN latest_datasets d ON d.name = r.name AND d.version = r.version "
        "JOIN edit_types t ON t.row_id = r.row_id WHERE r.name = 'edit' GROUP BY ALL"
    )
    counts = dict(zip(rows["level1"].to_pylist(), rows["n"].to_pylist(), strict=True))
    assert counts["object"] == round(0.3 * before) and set(counts) == {"object", "scene"}
    dropped = own.query("SELECT count(*) AS n FROM why_dropped WHERE dataset = 'edit' AND rule = 'quota'")["n"][0].as_py()
    assert dropped == before - sum(counts.values())


def test_quotas_can_be_tried_and_committed_on_a_file(own: Lake) -> None:  # noqa: F811
    file = PACKAGED / "edit.sql"
    trial = try_policy(own, file, overrides={"quotas": {"object": 0.5, "attribute": 0.5}, "quota_rows": 16})
    assert trial.kept == 16 and set(trial.leaving["rule"].to_pylist()) == {"quota"}
    with pytest.raises(PolicyError, match="--set quota: .* did you mean 'quotas'"):
        try_policy(own, file, overrides={"quota": "dreamlite"})
    made, _ = commit_policy(own, file, "edit", {"quotas": "dreamlite", "quota_rows": 20, "allow_unanimous": ["*"]})
    assert made["rows"] <= 20
    again = [item for item in refresh.curate(own, small_settings(policy={"allow_unanimous": ["*"]}), 0) if item["name"] == "edit"]
    assert again[0]["version"] == made["version"]
    bad = own.root / "edit.sql"
    bad.write_text(file.read_text().partition("-- @quota")[0] + "-- @quota\nSELECT row_id, level1, level2 FROM edit_typos\n")
    with pytest.raises(PolicyError, match="the quota block: there is no table 'edit_typos'; did you mean 'edit_types'"):
        try_policy(own, bad)
