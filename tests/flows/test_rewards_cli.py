"""The commands about reward models answer in the form that they promise, and refuse what cannot be in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dreamlite_data.rewards import load_reward
from flows.cli import app

runner = CliRunner()
FIXTURES = Path(__file__).parents[1] / "dreamlite_data" / "rewards" / "fixtures"
PROMPTS = {"hpsv3": ["rate: {text_prompt}"], "editreward": ["how well does it follow: {text_prompt}", "how well does it keep: {text_prompt}"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both golden checkpoints with short prompts, pictures, rows and pairs."""
    root = tmp_path_factory.mktemp("rewards_cli")
    for kind, prompts in PROMPTS.items():
        shutil.copytree(FIXTURES / f"{kind}_tiny", root / kind)
        spec = {"prompts": prompts, "min_px": 50176, "max_px": 50176}
        (root / kind / "reward_spec.json").write_text(json.dumps(spec))
    for path in FIXTURES.glob("image*.png"):
        shutil.copy(path, root)
    rows = [{"image": "image0.png", "prompt": "a cat"}, {"image": "none.png", "prompt": "a cat"}, {"image": "image1.png", "prompt": "x"}]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    edit = {"source": "image0.png", "edited": "image1.png", "instruction": "make it a cat"}
    (root / "edits.jsonl").write_text(json.dumps(edit) + "\n")
    pairs = [{"source": "image0.png", "edited_a": "image1.png", "edited_b": f"image{n}.png", "instruction": "x", "preferred": "a"} for n in (2, 3)]
    pairs.append(pairs[0] | {"preferred": "tie"})
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs) + "{broken\n")
    return root


def invoke(*arguments: object, code: int = 0) -> str:
    result = runner.invoke(app, ["rewards", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.mark.parametrize("command", ["score", "verify-checkpoint", "eval-pairs"])
def test_every_command_explains_itself(command: str) -> None:
    assert "MODEL_DIR" in invoke(command, "--help")


def test_score_prints_a_json_line_a_row_and_errors_in_place(folder: Path) -> None:
    rows = [json.loads(line) for line in invoke("score", "hpsv3", folder / "hpsv3", folder / "rows.jsonl").splitlines()]
    assert [row["row"] for row in rows] == [1, 2, 3, 4]
    assert "none.png" in rows[1]["error"] and "no valid JSON" in rows[3]["error"]
    wanted = load_reward(folder / "hpsv3").score([folder / "image0.png", folder / "image1.png"], ["a cat", "x"])
    assert [rows[0]["mu"], rows[2]["mu"]] == pytest.approx(wanted.mu.tolist(), abs=2e-5)
    assert [rows[0]["log_sigma"], rows[2]["log_sigma"]] == pytest.approx(wanted.log_sigma.tolist(), abs=2e-5)


def test_score_of_edits_has_both_heads(folder: Path) -> None:
    (row,) = [json.loads(line) for line in invoke("score", "editreward", folder / "editreward", folder / "edits.jsonl").splitlines()]
    assert row["mu"] == pytest.approx((row["follow_mu"] + row["quality_mu"]) / 2, abs=1e-5)
    assert {"follow_log_sigma", "quality_log_sigma"} <= row.keys()


def test_a_kind_that_is_not_the_checkpoint_s_is_refused_before_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreamlite_data.rewards.load_reward", None)
    text = invoke("score", "editreward", folder / "hpsv3", folder / "edits.jsonl", code=2)
    assert "of the kind hpsv3, not editreward" in text
    assert "of the kind hpsv3" in invoke("score", "editreward", folder / "hpsv3", folder / "edits.jsonl", "--dry-run", code=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "cuda:7"], "GPUs here"), (["--device", "abacus"], "is not auto, cpu"), (["--dtype", "int3"], "is not auto, float32"),
    ],
)  # fmt: skip
def test_a_device_or_type_that_is_not_there_is_refused(folder: Path, options: list[str], words: str) -> None:
    assert words in invoke("score", "hpsv3", folder / "hpsv3", folder / "rows.jsonl", *options, code=2)


def test_what_is_not_there_is_refused(folder: Path) -> None:
    assert "at which revision" in invoke("score", "hpsv3", "org/name", folder / "rows.jsonl", code=2)
    assert "there is no file" in invoke("score", "hpsv3", folder / "hpsv3", folder / "no.jsonl", code=2)
    invoke("score", "clip", folder / "hpsv3", folder / "rows.jsonl", code=2)


def test_dry_run_plans_from_headers_and_loads_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreamlite_data.rewards.load_reward", None)
    plan = json.loads(invoke("score", "hpsv3", folder / "hpsv3", folder / "rows.jsonl", "--dry-run", "--format", "json"))
    assert {row["part"] for row in plan["weights"]} == {"vision", "decoder", "embeddings", "heads", "lm_head (dropped)"}
    assert [row["weights_in"] for row in plan["memory"]] == ["bf16", "4-bit"] and plan["memory"][0]["batch_rows"] == 2
    half = json.loads(
        invoke("score", "hpsv3", folder / "hpsv3", folder / "rows.jsonl", "--dry-run", "--format", "json", "--utilisation", "0.2")
    )
    assert half["gpus"][0]["seconds_a_row"] == pytest.approx(2 * plan["gpus"][0]["seconds_a_row"])
    text = invoke("eval-pairs", "editreward", folder / "editreward", folder / "pairs.jsonl", "--dry-run")
    assert "time for 6 rows" in text and "H100" in text and "lm_head (dropped)" in text


def test_verify_checkpoint_tells_by_table_and_exit_code(folder: Path, tmp_path: Path) -> None:
    checks = json.loads(invoke("verify-checkpoint", folder / "hpsv3", "--format", "json"))
    assert {check["name"]: check["state"] for check in checks}["1-D positions"] == "ok"
    broken = Path(shutil.copytree(folder / "hpsv3", tmp_path / "broken"))
    (broken / "tokenizer.json").unlink()
    (broken / "vocab.json").unlink()
    assert "did not pass: vocabulary and template, loads" in invoke("verify-checkpoint", broken, code=1)
    text = invoke("verify-checkpoint", folder / "editreward", "--headers-only", "--keys")
    assert "rm_heads.head_1.5.bias" in text and "1-D positions" not in text


def test_eval_pairs_reports_each_judge_and_names_what_is_left_out(folder: Path) -> None:
    arguments = ("eval-pairs", "editreward", folder / "editreward", folder / "pairs.jsonl", "--format", "json")
    result = runner.invoke(app, ["rewards", *map(str, arguments)])
    rows = {row["judge"]: row for row in json.loads(result.stdout)}
    assert rows.keys() == {"score", "follow", "quality"} and "line 4 is left out: no valid JSON" in result.stderr
    for row in rows.values():
        assert (row["pairs"], row["ties"]) == (3, 1) and row["without_ties_low"] <= row["without_ties"] <= row["without_ties_high"]
    assert "no label" in invoke(*arguments, "--label-column", "other", code=2)
