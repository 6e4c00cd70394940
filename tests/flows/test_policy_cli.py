"""The commands about datasets say what they do, refuse what cannot be, and make the next run follow what was decided."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dreamlite_data.dataset import open_dataset
from dreamlite_data.lake import Lake
from flows import engine
from flows.cli import app
from flows.policy_cli import app as own_commands
from flows.policy_cli import policy
from flows.step import Step, StepResult
from tests.dreamlite_data.conftest import build, small_settings

runner = CliRunner()
POLICIES = Path(__file__).parents[2] / "dreamlite_data" / "policies"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("policy_cli") / "lake"
    scenes = {"t2i_rows": 40, "edit_rows": 24, "shard_rows": 40, "fault_share": 0.3}
    with Lake(root) as lake:
        build(lake, small_settings(scenes=scenes, photos={"enabled": False}, executor="local", workers=1))
    return root


@pytest.fixture
def lake(template: Path, tmp_path: Path) -> str:
    shutil.copytree(template, tmp_path / "lake")
    return str(tmp_path / "lake")


def invoke(*arguments: str, code: int = 0) -> str:
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.mark.parametrize(
    "command", [["datasets"], ["publish"], ["forget"], *(["policy", name] for name in ("try", "commit", "reset", "diff", "show"))]
)
def test_every_command_explains_itself(command: list[str]) -> None:
    assert "--lake" in invoke(*command, "--help")
    names = {item.name or item.callback.__name__: item for item in (*own_commands.registered_commands, *policy.registered_commands)}
    assert len(names[command[-1]].callback.__doc__) > 40


def test_try_shows_both_funnels_and_writes_only_the_sheet(lake: str, tmp_path: Path) -> None:
    with Lake(lake, read_only=True) as opened:
        snapshot = opened.snapshot()
    text = invoke(
        "policy", "try", str(POLICIES / "t2i.sql"), "--lake", lake, "--set", "min_sharpness=0.95", "--sheet", str(tmp_path / "s.html")
    )
    assert "current_rejected" in text and "leave by rule: sharp" in text and f"contact sheet: {tmp_path / 's.html'}" in text
    assert (tmp_path / "s.html").read_text().startswith("<!doctype html>")
    with Lake(lake, read_only=True) as opened:
        assert opened.snapshot() == snapshot


def test_commit_diff_show_reset_and_datasets_tell_one_story(lake: str) -> None:
    text = invoke("policy", "commit", str(POLICIES / "t2i.sql"), "--lake", lake, "--set", "min_sharpness=0.95")
    assert "dataset t2i@2:" in text
    assert "(as before" in invoke("policy", "commit", str(POLICIES / "t2i.sql"), "--lake", lake, "--set", "min_sharpness=0.95")
    assert "t2i@1 -> t2i@2: 0 added" in invoke("policy", "diff", "t2i", "--lake", lake)
    assert "t2i@2 -> t2i@1: " in invoke("policy", "diff", "t2i", "2", "1", "--lake", lake)
    assert "committed with version 2" in invoke("policy", "show", "t2i", "--lake", lake)
    assert "min_sharpness=0.95" in invoke("policy", "show", "t2i", "--lake", lake) and "0.95" not in invoke(
        "policy", "show", "t2i", "--version", "1", "--lake", lake
    )
    assert "committed" in invoke("datasets", "--lake", lake)
    assert "packaged policy holds again" in invoke("policy", "reset", "t2i", "--lake", lake)
    assert "the packaged policy" in invoke("policy", "show", "t2i", "--lake", lake)


@pytest.mark.parametrize(("arguments", "said"), [
    (("policy", "try", "absent.sql"), "cannot be read"),
    (("policy", "try", str(POLICIES / "t2i.sql"), "--set", "min_sharpnes=1"), "did you mean 'min_sharpness'"),
    (("policy", "try", str(POLICIES / "t2i.sql"), "--set", "min_sharpness"), "not of the form"),
    (("policy", "commit", str(POLICIES / "t2i.sql"), "--set", "min_side_px=9999", "--name", "none"), "no row of"),
    (("policy", "reset", "t2i"), "no committed policy"),
    (("policy", "diff", "t2i"), "has no parent"),
    (("policy", "show", "t21"), "no dataset 't21'"),
    (("publish", "t2i@x", "--to", "out"), "not NAME or NAME@VERSION"),
    (("publish", "t2i@7", "--to", "out"), "no version 7"),
    (("forget", "f00", "--reason", "asked"), "no image f00"),
    (("forget", "f00", "--reason", ""), "needs a reason"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence_with_exit_code_2(lake: str, arguments: tuple[str, ...], said: str) -> None:
    text = invoke(*arguments, "--lake", lake, code=2)
    assert text.startswith("error: ") and said in text


def test_no_command_makes_a_lake_that_is_not_there(tmp_path: Path) -> None:
    for arguments in (("policy", "commit", str(POLICIES / "t2i.sql")), ("forget", "f00", "--reason", "asked"), ("datasets",)):
        assert "there is no lake at" in invoke(*arguments, "--lake", str(tmp_path / "absent"), code=2)
    assert not (tmp_path / "absent").exists()


def test_publish_says_what_it_wrote_and_what_it_left_out(lake: str, tmp_path: Path) -> None:
    text = invoke("publish", "edit", "--to", str(tmp_path / "out"), "--lake", lake, "--format", "webdataset")
    rows = json.loads((tmp_path / "out" / "manifest.json").read_text())["rows"]
    assert f"edit@1: {rows:,} rows" in text
    assert "is there already" in invoke("publish", "edit", "--to", str(tmp_path / "out"), "--lake", lake, code=2)


def test_forget_shows_first_and_then_does_it(lake: str) -> None:
    with Lake(lake, read_only=True) as opened:
        image_id = open_dataset(opened, "t2i").rows["image_id"][0].as_py()
    assert "would forget 1 images" in invoke("forget", image_id, "--reason", "asked", "--dry-run", "--lake", lake)
    text = invoke("forget", image_id, "--reason", "asked", "--lake", lake)
    assert "forgot 1 images" in text and "t2i@2" in text and "proof" in text
    with Lake(lake, read_only=True) as opened:
        assert image_id not in open_dataset(opened, "t2i").rows["image_id"].to_pylist()


@pytest.mark.thorough
def test_what_people_decide_is_in_the_key_of_curate_and_nothing_decided_is_not(lake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [Step(name, lambda ctx: StepResult(), ("dreamlite_data.schema",)) for name in ("score", "curate")]

    def parts() -> dict[str, dict]:
        with Lake(lake, read_only=True) as opened:
            return {step.name: step.parts({}, engine.SourceTree())["external"] for step in engine.with_decisions(steps, opened)}

    assert parts() == {"score": {}, "curate": {}}
    invoke("policy", "commit", str(POLICIES / "t2i.sql"), "--lake", lake, "--set", "min_sharpness=0.95")
    committed = parts()
    assert committed["score"] == {} and committed["curate"].keys() == {"policies"}
    with Lake(lake, read_only=True) as opened:
        image_id = open_dataset(opened, "t2i").rows["image_id"][0].as_py()
    invoke("forget", image_id, "--reason", "asked", "--lake", lake)
    assert parts()["curate"].keys() == {"policies", "takedowns"}
    invoke("policy", "reset", "t2i", "--lake", lake)
    assert parts()["curate"]["policies"] != committed["curate"]["policies"]
    invoke("policy", "commit", str(POLICIES / "t2i.sql"), "--lake", lake, "--set", "min_sharpness=0.95")
    assert parts()["curate"]["policies"] != committed["curate"]["policies"]  # decided anew, so curated anew
    monkeypatch.setattr(engine, "build_steps", lambda flow, config: steps)
    planned, _ = engine.look_ahead("refresh", "smoke", Path(lake))
    assert planned[1].parts["external"].keys() == {"policies", "takedowns"}


def test_the_rules_of_verification_report_each_type_with_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console.Console.width", 200)
    text = invoke("verify-report", "--photos", "2", "--scene-edits", "8", "--faults")
    header = next(line for line in text.splitlines() if "precision" in line)
    assert ("recall" in header, "caught" in header) == (True, True)
    replaced = [line for line in text.splitlines() if "composite" in line and "replace" in line]
    assert len(replaced) > 1 and any(" to " in line for line in replaced)  # the type as a whole, and each of its faults
    [clip] = [line for line in text.splitlines() if line.startswith("not evaluated: clip_target (")]
    assert "composite replace" in clip and "not evaluated: text_after (text text_add" in text and "not evaluated: clear_fraction" not in text
