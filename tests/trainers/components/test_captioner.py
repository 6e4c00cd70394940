"""The captioner is asked as the data engine asks, learns from answers alone, and its folder opens in the engine's chat."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dreamlite_data import scenes
from dreamlite_data.chat import LocalChat, Question
from dreamlite_data.chat.local import load_processor
from dreamlite_data.responses import Responses
from trainers.components.build import PACKAGED
from trainers.components.captioner import (
    DIFFERENCE,
    Batch,
    caption_tokenizer,
    draw_batch,
    in_reading_order,
    measure_captioner,
    questions,
)
from trainers.components.classes import CELLS, IGNORE
from trainers.components.text_encoder import patchify


def test_the_loss_is_on_the_answers_alone() -> None:
    tokenizer = caption_tokenizer()
    scene = in_reading_order(scenes.sample_scene(np.random.default_rng(0)))
    batch = Batch(tokenizer, [("medium", [scene], "a red circle"), (DIFFERENCE, [scene, scene], "remove the red circle")])
    answers = [tokenizer.decode(labels[labels != IGNORE]) for labels in batch.labels]
    assert answers == ["a red circle<|im_end|>", "remove the red circle<|im_end|>"]
    assert (batch.ids == batch.pad).sum(1).tolist() == [CELLS, 2 * CELLS]


def test_training_reads_what_the_chat_asks() -> None:
    """The packaged folder's processor and template give the ids and pixels of a training batch."""
    folder = str(PACKAGED / "captioner")
    processor = load_processor(folder, None)
    scene = in_reading_order(scenes.sample_scene(np.random.default_rng(4)))
    image = Image.fromarray(scenes.render(scene))
    for style, shown in (("medium", [scene]), (DIFFERENCE, [scene, scene])):
        content = [*[{"type": "image"}] * len(shown), {"type": "text", "text": questions()[style]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        asked = processor(text=[text], images=[[image] * len(shown)], return_tensors="pt")
        batch = Batch(processor.tokenizer, [(style, shown, "x")])
        length = asked["input_ids"].shape[1]
        assert torch.equal(batch.ids[0, :length], asked["input_ids"][0]) and (batch.labels[0, :length] == IGNORE).all()
        patches, grids = patchify(np.stack([scenes.render(each) for each in shown]))
        assert torch.equal(grids, asked["image_grid_thw"]) and (patches - asked["pixel_values"]).abs().mean() < 0.01


def test_no_held_out_scene_is_drawn_and_pairs_differ_by_one_edit() -> None:
    batch = draw_batch(caption_tokenizer(), {"tag": 3, DIFFERENCE: 5}, np.random.default_rng(1))
    assert len(batch.shown) == 3 + 2 * 5 and len(batch.sources) == 5
    for source, target in zip(batch.shown[3::2], batch.shown[4::2], strict=True):
        assert scenes.describe_difference(source, target) is not None


@pytest.mark.parametrize("seed", [11, 12])
def test_the_packaged_captioner_answers_through_the_chat(tmp_path, seed: int) -> None:
    scene = scenes.sample_scene(np.random.default_rng(seed))
    target = scenes.apply_edit(scene, scenes.sample_edit(scene, np.random.default_rng(seed), "background"))
    payloads = []
    for each in (scene, target):
        Image.fromarray(scenes.render(each)).save(buffer := io.BytesIO(), "PNG")
        payloads.append(buffer.getvalue())
    chat = LocalChat(str(PACKAGED / "captioner"), "packaged")
    asked = [
        Question(questions()["medium"], (payloads[0],), ("first",), 96),
        Question(questions()[DIFFERENCE], tuple(payloads), ("first", "second"), 96),
    ]
    caption, difference = (answer.value for answer in chat.ask("caption", asked, Responses(tmp_path)))
    assert scenes.parse_caption(caption).key() == scene.key()
    assert difference == scenes.describe_difference(scene, target)


@pytest.mark.thorough
def test_the_packaged_captioner_reaches_what_it_must() -> None:
    metrics = measure_captioner(PACKAGED / "captioner", seed=77, count=100)
    assert metrics["caption_exact"] >= 0.92 and metrics["difference_exact"] >= 0.80  # see its record for the larger sample
