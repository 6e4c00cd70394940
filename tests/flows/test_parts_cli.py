"""`dreamlite parts` trains parts that a run can use, goes on where it was cut off, and says which part falls short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from trainers.components import build, reward
from trainers.settings import ComponentsSettings

runner = CliRunner()


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> ComponentsSettings:
    """Settings of a build of seconds; measures are not what is tested here."""
    monkeypatch.setitem(reward.GROUPS, "generate", 2)
    monkeypatch.setattr(build, "measure_part", lambda folder, name: {"measured": 1.0})
    return ComponentsSettings(source="train", reward_steps=1)


def test_a_build_goes_on_with_the_part_it_was_at(tmp_path: Path, brief: ComponentsSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    build.build_parts(tmp_path, brief, ["rewards/generate"])
    record = tmp_path / "rewards" / "generate" / "record.json"
    assert json.loads(record.read_text())["held_out"] == {"measured": 1.0}
    first = record.stat().st_mtime_ns
    trained = []
    monkeypatch.setattr(build, "_train", lambda name, *rest: trained.append(name) or {})
    build.build_parts(tmp_path, brief, ["rewards/generate"])
    assert trained == [] and record.stat().st_mtime_ns == first
    record.unlink()  # killed before the record was written
    build.build_parts(tmp_path, brief, ["rewards/generate"])
    assert trained == ["rewards/generate"]


def test_a_captioner_without_eyes_and_an_unknown_part_are_refused_before_any_training(tmp_path: Path, brief: ComponentsSettings) -> None:
    with pytest.raises(ValueError, match="no text_encoder: build it first"):
        build.build_parts(tmp_path, brief, ["captioner"])
    with pytest.raises(ValueError, match="there is no part ears: the parts are vae, "):
        build.build_parts(tmp_path, brief, ["ears"])


def test_measure_prints_each_target_and_fails_where_one_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "measure_part", lambda folder, name: {"pair_accuracy": 0.94, "calibration_error": 0.9})
    short = runner.invoke(app, ["parts", "measure", "--only", "rewards/generate"])
    assert short.exit_code == 1 and "short of what it must reach: rewards/generate pair_accuracy" in short.stderr
    assert "0.95" in short.stdout
    monkeypatch.setattr(build, "measure_part", lambda folder, name: {"pair_accuracy": 0.96})
    assert runner.invoke(app, ["parts", "measure", "--only", "rewards/generate"]).exit_code == 0
    assert runner.invoke(app, ["parts", "measure", "--only", "ears"]).exit_code == 2
