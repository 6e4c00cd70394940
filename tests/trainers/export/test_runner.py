"""The runner needs no torch, treats rows independently, and says clearly what it cannot do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamlite_data import scenes
from trainers.evaluate import draw_questions
from trainers.export.evaluate import evaluate_bundle
from trainers.export.runner import Runner

FRESH_PROCESS = """
import sys
import numpy as np
from runner import Runner
runner = Runner(".", "int8")
made = runner.generate(["a red circle"], [1])
edited = runner.edit(list(made), ["make it blue"], [2])
assert made.shape == edited.shape == (1, 64, 64, 3) and made.dtype == np.uint8
heavy = {"torch", "transformers", "diffusers", "ray", "dreamlite_data", "trainers"} & set(sys.modules)
assert not heavy, heavy
"""


def test_bundle_runs_alone_without_torch(bundle: Path) -> None:
    """Only the bundle directory is on the path; generation and edits import nothing heavy."""
    done = subprocess.run([sys.executable, "-I", "-c", "import sys; sys.path.insert(0, '.')\n" + FRESH_PROCESS], cwd=bundle,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_package_import_of_the_runner_stays_light(bundle: Path) -> None:
    code = "import sys, trainers.export.runner; assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_rows_do_not_depend_on_their_batch(bundle: Path) -> None:
    runner = Runner(bundle)
    together = runner.generate(["a red circle", "a blue square on a white background"], [7, 8])
    alone = runner.generate(["a blue square on a white background"], [8])
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1
    other_seed = runner.generate(["a blue square on a white background"], [9])
    assert np.abs(other_seed[0].astype(int) - alone[0]).max() > 1


def test_seed_fixes_the_noise(bundle: Path) -> None:
    runner = Runner(bundle)
    first, second = runner.initial_noise([3, 4]), runner.initial_noise([4, 3])
    assert np.array_equal(first[0], second[1]) and not np.array_equal(first[0], first[1])
    assert first.shape == (2, 4, 8, 8) and first.dtype == np.float32


def test_edit_depends_on_its_source(bundle: Path) -> None:
    runner = Runner(bundle)
    black, white = np.zeros((64, 64, 3), np.uint8), np.full((200, 100, 3), 255, np.uint8)
    out = runner.edit([black, Image.fromarray(white)], ["make it blue"] * 2, [1, 1])
    assert out.shape == (2, 64, 64, 3)
    hidden, mask = runner.encode_edits([black, white], ["make it blue"] * 2)
    assert np.abs(hidden[0] - hidden[1]).max() > 1e-3
    noise = runner.initial_noise([1, 1])
    latents = runner.denoise(noise, runner.encode_images([black, white]), hidden, mask)
    assert np.abs(latents[0] - latents[1]).max() > 1e-4


def test_long_prompts_are_cut_and_long_edits_refused(bundle: Path) -> None:
    runner = Runner(bundle)
    long = "red circle " * 80
    with pytest.warns(UserWarning, match="prompt cut"):
        hidden, mask = runner.encode_prompts([long])
    assert hidden.shape[:2] == mask.shape == (1, 64) and mask.sum() == 64
    with pytest.raises(ValueError, match="instruction needs"):
        runner.edit([np.zeros((64, 64, 3), np.uint8)], [long], [0])


def test_wrong_calls_are_one_sentence(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="variant 'int3'"):
        Runner(bundle, "int3")
    with pytest.raises(ValueError, match="manifest.json"):
        Runner(tmp_path)
    with pytest.raises(ValueError, match="2 prompts, 1 seeds"):
        Runner(bundle).generate(["a", "b"], [0])
    assert Runner(bundle).generate([], []).shape == (0, 64, 64, 3)


def test_without_its_encoder_a_bundle_takes_hidden_states(bundle: Path) -> None:
    """A bundle whose encoder stays outside says so, and edits with states from elsewhere just the same."""
    image, whole, bare = np.zeros((64, 64, 3), np.uint8), Runner(bundle), Runner(bundle)
    bare.files = {name: file for name, file in bare.files.items() if name != "edit_encoder"}
    with pytest.raises(ValueError, match="hidden_states="):
        bare.edit([image], ["make it blue"], [3])
    states = whole.encode_edits([image], ["make it blue"])
    assert np.array_equal(bare.edit([image], [""], [3], hidden_states=states), whole.edit([image], ["make it blue"], [3]))


def test_evaluation_counts_and_is_repeatable(bundle: Path, small_export: tuple, tmp_path: Path) -> None:
    """Random weights read as no scene; groups add up to the whole; equal seeds give equal scores."""
    judged = evaluate_bundle(bundle, small_export[0], "fp32", seed=1, output=tmp_path)
    rows = {row["metric"]: row for row in judged.scores if row["metric"] != "seconds_per_image"}
    assert rows["generate_exact"]["value"] == 0.0
    for task in ("generate", "edit"):
        groups = [row["n"] for name, row in rows.items() if name.startswith(f"{task}_exact_")]
        assert sum(groups) == rows[f"{task}_exact"]["n"] == 8
    assert {path.name for path in tmp_path.iterdir()} == {"grid_generate_fp32.png", "grid_edit_fp32.png"}
    again = evaluate_bundle(bundle, small_export[0], "fp32", seed=1)
    assert rows == {row["metric"]: row for row in again.scores if row["metric"] != "seconds_per_image"}
    assert judged.answers == again.answers and [row["task"] for row in again.answers] == ["generate"] * 8 + ["edit"] * 8


def test_perfect_model_scores_one(bundle: Path, small_export: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the truth in place of the model gives 1, so a 0 is the model's and not the grader's."""
    asked = draw_questions(8, small_export[0].evaluate_seed)
    monkeypatch.setattr(Runner, "generate", lambda *_: np.stack([scenes.render(scene) for scene in asked.wanted]))
    monkeypatch.setattr(Runner, "edit", lambda *_: np.stack([scenes.render(scene) for scene in asked.targets]))
    judged = evaluate_bundle(bundle, small_export[0], "fp32", seed=1)
    assert all(row["value"] == 1.0 for row in judged.scores if "exact" in row["metric"])
    assert all(row["exact"] and row["wrong"] == [] for row in judged.answers)
