"""Changes between stages in SQL: paired by question and repetition, equal to the published interval, and found in runs that reused steps."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from dreamlite_data.lake import Lake
from dreamlite_data.schema import rows_table

START = datetime(2026, 1, 1, tzinfo=UTC)


def answers(stage: str, right: np.ndarray, rewards: np.ndarray | None = None, run: str = "r") -> list[dict]:
    """Rows of answers [repetitions, questions]."""
    return [
        {"run_id": run, "stage": stage, "task": "edit", "question_id": f"q{question}", "repetition": repetition, "exact": bool(value),
         "reward": None if rewards is None else float(rewards[repetition, question])}
        for repetition, line in enumerate(right) for question, value in enumerate(line)
    ]  # fmt: skip


def step(name: str, second: int, run: str = "r", state: str = "done", **outputs: str) -> dict:
    return {"run_id": run, "step": name, "key": name, "state": state, "started_at": START + timedelta(seconds=second), "outputs_json": json.dumps(outputs)}


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    with Lake(tmp_path) as lake:
        yield lake


def fill(lake: Lake, *rows: list[dict], steps: list[dict]) -> None:
    lake.append({"eval_answers": rows_table("eval_answers", [row for part in rows for row in part]), "steps": rows_table("steps", steps)})


TWO = [step("evaluate_sft", 0), step("evaluate_refl", 9)]


def test_single_answers_give_the_interval_of_agresti_and_min(lake: Lake) -> None:
    before = np.repeat([1, 1, 0, 0], [80, 6, 3, 11])[None]
    after = np.repeat([1, 0, 1, 0], [80, 6, 3, 11])[None]
    fill(lake, answers("sft", before), answers("refl", after), steps=TWO)
    (row,) = lake.query("SELECT * FROM eval_changes").to_pylist()
    assert (row["before"], row["stage"], row["questions"], row["mended"], row["broken"]) == ("sft", "refl", 100, 3, 6)
    assert row["exact_change"] == pytest.approx(-0.03)
    # Half an answer more in each of the four cells: (c - b) / n and its Wald interval of the table so enlarged.
    n, b, c = 102, 6.5, 3.5
    half = 1.96 * math.sqrt(b + c - (c - b) ** 2 / n) / n
    assert (row["exact_low"], row["exact_high"]) == pytest.approx(((c - b) / n - half, (c - b) / n + half))
    unpaired = 1.96 * math.sqrt(0.86 * 0.14 / 100 + 0.83 * 0.17 / 100)
    assert 2 * unpaired > 1.5 * (row["exact_high"] - row["exact_low"])  # what the pairing is for
    assert row["reward_change"] is None and row["reward_low"] is None


def test_answers_that_never_change_are_no_proof_of_no_change(lake: Lake) -> None:
    fill(lake, answers("sft", np.ones((1, 40))), answers("refl", np.ones((1, 40))), steps=TWO)
    (row,) = lake.query("SELECT * FROM eval_changes").to_pylist()
    assert row["mended"] == row["broken"] == 0 and row["exact_low"] < -0.02 and row["exact_high"] > 0.02


def test_repetitions_count_as_one_question_and_pair_with_their_own_noise(lake: Lake) -> None:
    rng = np.random.default_rng(0)
    right, rewards = rng.random((3, 50)) < 0.8, rng.normal(size=(3, 50))
    shift = np.repeat(rng.normal(0.3, 0.5, (1, 50)), 3, axis=0)  # the same for each picture of a question
    fill(lake, answers("sft", right, rewards), answers("refl", right, rewards + shift), steps=TWO)
    (row,) = lake.query("SELECT * FROM eval_changes").to_pylist()
    assert (row["questions"], row["pictures"], row["mended"], row["broken"]) == (50, 150, 0, 0)
    half = 1.96 * shift[0].std(ddof=1) / math.sqrt(50)  # of 50 questions, not of 150 pictures
    assert (row["reward_low"], row["reward_high"]) == pytest.approx((shift.mean() - half, shift.mean() + half))


def test_a_run_that_reused_a_step_is_compared_with_the_answers_of_the_run_that_made_them(lake: Lake) -> None:
    first, second = np.array([[1, 0, 1, 1]]), np.array([[1, 1, 1, 1]])
    fill(lake, answers("sft", first, run="old"), answers("refl", first, run="old"), answers("refl", second, run="new"), steps=[
        step("evaluate_sft", 0, "old"), step("evaluate_refl", 9, "old"),
        step("evaluate_sft", 20, "new", "skipped", done_by="old"), step("evaluate_refl", 29, "new"),
    ])  # fmt: skip
    found = {row["run_id"]: (row["before"], row["stage"], row["mended"]) for row in lake.query("SELECT * FROM eval_changes").to_pylist()}
    assert found == {"old": ("sft", "refl", 0), "new": ("sft", "refl", 1)}


def test_exported_variants_are_compared_with_fp32_and_other_questions_with_nothing(lake: Lake) -> None:
    right = np.array([[1, 1, 0]])
    other = [{**row, "question_id": f"other-{row['question_id']}"} for row in answers("dmd2", right)]
    rows = [answers(f"export_{variant}", right) for variant in ("int8", "fp32", "fp16")]
    fill(lake, *rows, other, steps=[step("evaluate_dmd2", 0), step("evaluate_export", 9)])
    pairs = {(row["before"], row["stage"]) for row in lake.query("SELECT * FROM eval_changes").to_pylist()}
    assert pairs == {("export_fp32", "export_fp16"), ("export_fp32", "export_int8"), ("export_fp16", "export_int8")}
