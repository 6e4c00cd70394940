"""Models of the real classes, tiny and untrained: loaded by folder, asked for instructions and pictures, the best try kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from dreamlite_data import scenes
from dreamlite_data.images import decode_stored, encode_png
from dreamlite_data.operators.edit import Form, Request
from dreamlite_data.operators.edit_model import EditModelError, PipelineEditor, VlmInstructor, choose, parse_proposals
from dreamlite_data.operators.edit_routes import model_route
from dreamlite_data.rewards import load_reward
from dreamlite_data.settings import EditModelSettings, RefreshSettings
from tests.dreamlite_data.rewards.conftest import short
from tests.trainers.conftest import checkpoints, components  # noqa: F401  (fixtures)
from trainers.components.text_encoder import IMAGE_PX, PATCH_PX, text_encoder_config
from trainers.components.tokenizer import build_processor, build_tokenizer

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|>"
    "<|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
SCENE = scenes.render(scenes.sample_scene(np.random.default_rng(0)))


@pytest.fixture(scope="module")
def instructor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL and its processor in one folder, as a checkpoint of the hub lies."""
    torch.manual_seed(3)
    folder, tokenizer = tmp_path_factory.mktemp("instructor"), build_tokenizer()
    tokenizer.chat_template = CHAT
    build_processor(tokenizer, image_px=IMAGE_PX, patch_px=PATCH_PX).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen3VLForConditionalGeneration(text_encoder_config(tokenizer, hidden=64, layers=2, vision_layers=1, vision_hidden=32)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = ["how well does it follow: {text_prompt}", "how well does it keep: {text_prompt}"]
    return short("editreward_tiny", tmp_path_factory.mktemp("reward"), prompts)


def test_a_models_answer_is_read_line_by_line() -> None:
    answer = "1. remove: take the cup away\n- **colour**: make the roof red\nnonsense: 7\n\nadd: take the cup away \x07\nTurn it: upside down now\nadd: " + "x" * 400
    assert parse_proposals(answer) == [
        ("remove", "take the cup away"), ("colour", "make the roof red"), ("unmapped", "Turn it: upside down now")]  # fmt: skip
    assert parse_proposals("") == parse_proposals("\n \n3\n") == []


def test_the_instructor_says_what_its_model_generates(instructor_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instructor = VlmInstructor(instructor_folder, "w", 2, max_new_tokens=12)
    answer = instructor.answer(SCENE)
    assert answer and answer == VlmInstructor(instructor_folder, "w", 2, max_new_tokens=12).answer(SCENE)
    # An untrained model may say nothing usable, so its words are replaced: what is read of them, and how it is stored, stays real.
    monkeypatch.setattr(VlmInstructor, "answer", lambda self, pixels, prompt=None: "remove: take the red circle away\nbackground: make the sky dark\nadd: a cat")
    requests = list(instructor.requests(SCENE, "a" * 64))
    assert [(request.edit_type, request.instruction) for request in requests] == [
        ("remove", "take the red circle away"), ("background", "make the sky dark")]  # fmt: skip
    assert requests[0].forms == (Form("short", "take the red circle away", instructor.prompt_id),)


def test_another_picture_or_prompt_reaches_the_model(instructor_folder: Path) -> None:
    from dreamlite_data.operators import edit_model

    model, processor = edit_model._vlm(str(instructor_folder), "cpu")
    seen: list[dict] = []
    real = model.generate
    model.generate = lambda **inputs: seen.append(inputs) or real(**inputs)
    try:
        for pixels in (SCENE, 255 - SCENE):
            VlmInstructor(instructor_folder, "w", 1, max_new_tokens=2).answer(pixels)
    finally:
        model.generate = real
    assert not torch.equal(seen[0]["pixel_values"], seen[1]["pixel_values"])
    assert "Propose 1 different edits" in processor.batch_decode(seen[0]["input_ids"])[0] and not seen[0]["do_sample"]


def test_the_pipeline_makes_the_picture_that_its_seed_gives(checkpoints: dict[str, Path]) -> None:  # noqa: F811
    editor = PipelineEditor(checkpoints["base"], "w", 1, 2)
    request = Request("recolour", "make the red circle blue", ())
    made = editor.tries(SCENE, "a" * 64, request)
    assert len(made) == 1 and made[0].target.shape == SCENE.shape and made[0].reject_reason is None
    assert np.array_equal(made[0].target, editor.tries(SCENE, "a" * 64, request)[0].target)
    assert not np.array_equal(made[0].target, editor.tries(SCENE, "b" * 64, request)[0].target)


def test_the_best_try_is_kept_and_the_others_are_negatives_with_their_reason(
    checkpoints: dict[str, Path], instructor_folder: Path, reward_folder: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    words = "make the red circle blue"
    monkeypatch.setattr(VlmInstructor, "answer", lambda self, pixels, prompt=None: f"recolour: {words}")
    settings = EditModelSettings(instructor=instructor_folder, editor=checkpoints["base"], reward=reward_folder, tries=3, inference_steps=2)
    operator = model_route(settings, {"instructor": "i", "editor": "e", "reward": "r"})
    answer = operator(pa.table({"image_id": ["a" * 64], "bytes": [encode_png(SCENE)]}))
    assert answer["error"].to_pylist() == [None] and answer["edits"].to_pylist() == [1]
    tables = operator.side_tables(None, answer)
    edits = tables["edits"].to_pylist()
    assert [row["route"] for row in edits] == ["model"] * 3 and sum(not row["rejected"] for row in edits) == 1
    pictures = {row["image_id"]: Image.fromarray(decode_stored(row["bytes"])) for row in tables["images"].to_pylist()}
    targets = [pictures[row["target_image_id"]] for row in edits]
    mu = load_reward(reward_folder).score(targets, [words] * 3, [Image.fromarray(SCENE)] * 3).mu
    assert not edits[int(np.argmax(mu))]["rejected"]
    assert all(row["reject_reason"].startswith("not_best: ") for row in edits if row["rejected"])


def test_choosing() -> None:
    changed, other = 255 - SCENE, np.roll(SCENE, 9, axis=0)
    assert choose(SCENE, [SCENE, changed, other], [9.0, 1.0, 2.0], None) == [
        "no_op: 0.0000 of the pixels changed", "not_best: 1.0000 <= 2.0000", None]  # fmt: skip
    assert choose(SCENE, [changed, other], [1.0, 2.0], 3.0) == ["low_reward: 1.0000 < 3.0000", "low_reward: 2.0000 < 3.0000"]
    assert choose(SCENE, [changed, other], [2.0, 2.0], None)[0] is None  # of equals the earlier
    assert choose(SCENE, [changed], [None], None) == [None]
    assert choose(SCENE, [changed, other], [None, 1.0], None) == ["no_reward: the picture could not be scored", None]


def test_what_is_no_model_is_said_plainly(tmp_path: Path, checkpoints: dict[str, Path]) -> None:  # noqa: F811
    with pytest.raises(EditModelError, match="holds no image-text-to-text model"):
        VlmInstructor(tmp_path, "w", 1).answer(SCENE)
    with pytest.raises(EditModelError, match="holds no diffusers pipeline"):
        PipelineEditor(tmp_path, "w", 1, 1).tries(SCENE, "a", Request("add", "add a cat", ()))
    operator = model_route(EditModelSettings(instructor=tmp_path, editor=tmp_path, tries=1), {"instructor": "i", "editor": "e"})
    with pytest.raises(EditModelError, match="holds no image-text-to-text model"):  # and not a table full of error rows
        operator(pa.table({"image_id": ["a"], "bytes": [encode_png(SCENE)]}))
    with pytest.raises(ValueError, match="needs an instructor"):
        RefreshSettings(edit_model={"editor": tmp_path})
    with pytest.raises(ValueError, match="tries above 1 needs a reward"):
        RefreshSettings(edit_model={"editor": tmp_path, "instructor": tmp_path})
