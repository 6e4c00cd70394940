"""A policy is tried without a trace, committed with one, and refused where its SQL is not what a policy may be."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from dreamlite_data import refresh
from dreamlite_data.dataset import DatasetError, open_dataset
from dreamlite_data.lake import Lake
from dreamlite_data.policies import PolicyError
from dreamlite_data.policies.contact_sheet import write_contact_sheet
from dreamlite_data.policies.curate import CurationError
from dreamlite_data.policies.decided import decided
from dreamlite_data.policies.trial import commit_policy, reset_policy, try_policy
from dreamlite_data.policies.versions import diff_versions, list_versions, stored_rules
from dreamlite_data.settings import RefreshSettings

PACKAGED = Path(refresh.__file__).parent / "policies"
STRICT = 0.95
CANDIDATES = (PACKAGED / "t2i.sql").read_text().split("-- @candidates")[1].split("-- @rule")[0].strip()


@pytest.fixture
def own(built: Lake, tmp_path: Path) -> Lake:
    """A refreshed lake that a test may change."""
    shutil.copytree(built.root, tmp_path / "own")
    return Lake(tmp_path / "own")


def policy_file(folder: Path, rules: str, candidates: str = CANDIDATES) -> Path:
    path = folder / "t2i.sql"
    path.write_text(f"-- @candidates\n{candidates}\n{rules}\n")
    return path


# --- try -------------------------------------------------------------------------------------------------------------


def test_the_packaged_policy_changes_nothing_and_a_stricter_one_loses_exactly_the_rows_below_it(built: Lake) -> None:
    snapshot = built.snapshot()
    same = try_policy(built, PACKAGED / "t2i.sql")
    assert (len(same.entering), len(same.leaving)) == (0, 0) and same.kept == len(open_dataset(built, "t2i"))
    assert all(row["rows_in"] == row["current_rows_in"] and row["rejected"] == row["current_rejected"] for row in same.funnel)
    strict = try_policy(built, PACKAGED / "t2i.sql", overrides={"min_sharpness": STRICT})
    sharpness = {r["row_id"]: r["sharpness"] for r in built.query("SELECT row_id, sharpness FROM t2i_records").to_pylist()}
    blurred = {row_id for row_id in open_dataset(built, "t2i").rows["row_id"].to_pylist() if sharpness[row_id] < STRICT}
    assert blurred and set(strict.leaving["row_id"].to_pylist()) == blurred
    assert set(strict.leaving["rule"].to_pylist()) == {"sharp"}
    for row_id, margin in zip(strict.leaving["row_id"].to_pylist(), strict.leaving["margin"].to_pylist(), strict=True):
        assert margin == pytest.approx(sharpness[row_id] - STRICT, abs=1e-6)
    assert built.snapshot() == snapshot


def test_a_trial_says_why_rows_that_enter_were_out(built: Lake, tmp_path: Path) -> None:
    text = (PACKAGED / "t2i.sql").read_text()
    loose = tmp_path / "t2i.sql"
    loose.write_text(text[: text.index("-- @rule caption_matches_image")])
    entering = try_policy(built, loose).entering.to_pylist()
    assert entering and {row["rule"] for row in entering} == {"caption_matches_image"}


def test_the_current_funnel_keeps_the_rules_that_a_trial_lacks(built: Lake, tmp_path: Path) -> None:
    trial = try_policy(built, policy_file(tmp_path, "-- @rule ingested\nerror IS NULL"))
    row = next(row for row in trial.funnel if row["rule"] == "sharp")
    assert row["rows_in"] is None and row["current_rejected"] > 0


# --- what a file may say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rules", "said"), [
    ("-- @rule a\nsharpnes > 0.5", r"rule a: there is no column 'sharpnes'; did you mean 'sharpness'"),
    ("-- @rule a\ntrue) FROM candidates; DROP TABLE captions; SELECT (true", "must be one expression"),
    ("-- @rule a\ntrue) AS x FROM (SELECT 1) -- ", "must be one expression"),
    ("-- @rule a\nsharpness > 0.5 -- sharp", "without a comment at its end"),
    ("-- @rule a\nsharpness > 0.5, true", "must be one expression"),
    ("-- @rule a\n(SELECT count(*) FROM read_text('/etc/hostname')) > 0", "read_text is refused"),
    ("-- @rule x';DROP/**/TABLE/**/captions;--\ntrue", "a rule cannot be called"),
    ("-- @rule a when=strict\ntrue\n-- @rule b\ntrue", r"reads \$strict, which no setting provides"),
    ("-- @rule a\nsharpness > $min_sharpnes", r"reads \$min_sharpnes, which no setting provides"),
])  # fmt: skip
def test_a_rule_that_is_not_one_harmless_expression_is_refused(built: Lake, tmp_path: Path, rules: str, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        try_policy(built, policy_file(tmp_path, rules))


@pytest.mark.parametrize(("candidates", "said"), [
    ("SELECT * FROM t2i_record", "there is no table 't2i_record'; did you mean 't2i_records'"),
    ("SELECT row_id FROM t2i_records", "lack the columns task, image_id"),
    ("SELECT row_idd FROM t2i_records", "no column 'row_idd'; did you mean 'row_id'"),
    ("DELETE FROM captions", "must hold one SELECT"),
    ("SELECT 1; DELETE FROM captions", "must hold one SELECT"),
    ("ATTACH '/tmp/x.db' AS x", "must hold one SELECT"),
    ("COPY captions TO '/tmp/out.csv'", "must hold one SELECT"),
    ("SELECT * FROM read_csv('/etc/passwd')", "read_csv is refused"),
    ("SELECT * FROM '/etc/passwd'", "/etc/passwd"),
])  # fmt: skip
def test_candidates_that_write_or_look_elsewhere_are_refused(built: Lake, tmp_path: Path, candidates: str, said: str) -> None:
    snapshot = built.snapshot()
    with pytest.raises(PolicyError, match=re.escape(said)):
        try_policy(built, policy_file(tmp_path, "-- @rule a\ntrue", candidates))
    assert built.snapshot() == snapshot


@pytest.mark.parametrize(("overrides", "said"), [
    ({"min_sharpnes": 1}, "did you mean 'min_sharpness'"),
    ({"min_sharpness": "much"}, "--set min_sharpness=much"),
])  # fmt: skip
def test_a_wrong_parameter_is_refused(built: Lake, overrides: dict, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        try_policy(built, PACKAGED / "t2i.sql", overrides=overrides)


def test_a_file_or_name_that_cannot_be_is_refused(built: Lake, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be read"):
        try_policy(built, tmp_path / "absent.sql")
    with pytest.raises(PolicyError, match="cannot be called 'T2I;'"):
        try_policy(built, PACKAGED / "t2i.sql", "T2I;")


def test_a_unanimous_rule_warns_in_a_trial_and_stops_a_commit(own: Lake, tmp_path: Path) -> None:
    file = policy_file(tmp_path, "-- @rule nothing\nwidth < 0\n-- @rule after\nwidth > 0")
    warnings = try_policy(own, file).warnings
    assert "t2i.nothing rejected all" in warnings[0] and "t2i.after was never evaluated" in warnings[1]
    versions = list_versions(own)
    with pytest.raises(CurationError, match="rejected all"):
        commit_policy(own, file, "t2i")
    assert list_versions(own) == versions
    made, _ = commit_policy(own, file, "t2i", {"allow_unanimous": ["*"]})
    assert made["rows"] == 0


# --- commit ----------------------------------------------------------------------------------------------------------


def test_a_commit_is_a_version_with_a_parent_and_a_diff_that_names_the_rule(own: Lake) -> None:
    trial = try_policy(own, PACKAGED / "t2i.sql", overrides={"min_sharpness": STRICT})
    made, _ = commit_policy(own, PACKAGED / "t2i.sql", "t2i", {"min_sharpness": STRICT})
    assert (made["version"], made["rows"]) == (2, trial.kept)
    assert list_versions(own)[-2]["parent"] == 1 and list_versions(own)[-2]["policy"] == "committed"
    found = diff_versions(own, "t2i")
    assert (found.before, found.after) == (1, 2) and found.counts() == {"added": 0, "removed": len(trial.leaving), "changed": 0}
    assert set(found.rows["rule"].to_pylist()) == {"sharp"}
    assert [rule for rule, _, _ in found.rules] == ["sharp"] and f"min_sharpness={STRICT}" in found.rules[0][2]
    back = diff_versions(own, "t2i", 2, 1)
    assert back.counts() == {"added": len(trial.leaving), "removed": 0, "changed": 0}
    assert set(back.rows["rule"].to_pylist()) == {"sharp"}  # what kept them out of version 2
    with pytest.raises(DatasetError, match="no version 7"):
        diff_versions(own, "t2i", 7, 1)
    assert dict((row["rule"], row["parameters"]) for row in stored_rules(own, "t2i")[1])["sharp"] == f"min_sharpness={STRICT}"
    assert commit_policy(own, PACKAGED / "t2i.sql", "t2i", {"min_sharpness": STRICT})[0] == made  # again: no third version
    assert own.count("policies") == 1


@pytest.mark.thorough
def test_a_committed_policy_holds_in_every_refresh_until_it_is_reset(own: Lake, settings: RefreshSettings) -> None:
    packaged = {row["name"]: row for row in refresh.curate(own, settings, 0)}
    before = decided(own)
    committed, _ = commit_policy(own, PACKAGED / "t2i.sql", "t2i", {"min_sharpness": STRICT})
    assert decided(own) != before
    again = {row["name"]: row for row in refresh.curate(own, settings, 0)}
    assert again["t2i"] == committed
    assert again["rl"]["version"] == 2  # what draws from it follows
    assert again["photos"] == packaged["photos"]
    reset_policy(own, "t2i")
    back = {row["name"]: row for row in refresh.curate(own, settings, 0)}
    assert back["t2i"]["version"] == 3 and back["t2i"]["digest"] == packaged["t2i"]["digest"]
    with pytest.raises(PolicyError, match="no committed policy is in force for 't2i'"):
        reset_policy(own, "t2i")


@pytest.mark.thorough
def test_a_policy_of_a_new_name_is_a_dataset_of_its_own_in_later_refreshes(own: Lake, settings: RefreshSettings, tmp_path: Path) -> None:
    file = tmp_path / "red.sql"
    file.write_text(f"-- @candidates\n{CANDIDATES}\n-- @rule ingested\nerror IS NULL\n-- @rule red\ntext LIKE '%red%'\n")
    made, _ = commit_policy(own, file, "red")
    assert 0 < made["rows"] < len(open_dataset(own, "t2i")) and all(
        "red" in text for text in open_dataset(own, "red").rows["text"].to_pylist()
    )
    names = [row["name"] for row in refresh.curate(own, settings, 0)]
    assert names == ["t2i", "edit", "photos", "photo_edits", "rl", "red"]
    reset_policy(own, "red")
    assert "red" not in [row["name"] for row in refresh.curate(own, settings, 0)]


# --- contact sheet ---------------------------------------------------------------------------------------------------


def test_the_contact_sheet_holds_its_pictures_and_sorts_the_border_by_margin(built: Lake, tmp_path: Path) -> None:
    trial = try_policy(built, PACKAGED / "edit.sql", overrides={"min_sharpness": 0.9})
    path = write_contact_sheet(built, trial, tmp_path / "sheet.html", samples=4)
    page = path.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "<script" not in page and "prefers-color-scheme:dark" in page
    sharp = page.split("<h2>sharp</h2>")[1].split("<section>")[0]
    kept, dropped = sharp.split('<div class="side drop">')
    for side in (kept, dropped):
        margins = [abs(float(text)) for text in re.findall(r'class="margin">([-+.\de]+)<', side)]
        assert len(margins) == 4 and margins == sorted(margins)
        assert {"source", "target", "mask"} <= set(re.findall(r'alt="(\w+)"', side))
    assert all(text.startswith("+") for text in re.findall(r'class="margin">([-+.\de]+)<', kept))
    assert all(text.startswith("-") for text in re.findall(r'class="margin">([-+.\de]+)<', dropped))
    assert path.read_bytes() == write_contact_sheet(built, trial, tmp_path / "again.html", samples=4).read_bytes()


def test_words_of_a_row_are_text_and_never_markup(own: Lake, tmp_path: Path) -> None:
    file = tmp_path / "evil.sql"
    file.write_text(f"-- @candidates\nSELECT * REPLACE ('<img src=x onerror=alert(1)>' AS text) FROM ({CANDIDATES})\n"
                    "-- @rule ingested\nerror IS NULL\n")  # fmt: skip
    page = write_contact_sheet(own, try_policy(own, file), tmp_path / "sheet.html").read_text()
    assert "&lt;img src=x" in page and "<img src=x" not in page
