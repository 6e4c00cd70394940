"""A model by path answers as transformers itself does, asks nothing twice, and an answer that was cut off is no answer."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamlite_data import scenes
from dreamlite_data.chat import LocalChat, Question, local
from dreamlite_data.responses import Responses
from tests.dreamlite_data.chat.conftest import CHAT_TEMPLATE

LIMIT = 24


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    return [Image.fromarray(scenes.render(scenes.sample_scene(rng))) for _ in range(count)]


def question(image: Image.Image, prompt: str = "Describe the image", limit: int = LIMIT) -> Question:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Question(prompt, (buffer.getvalue(),), (hashlib.sha256(buffer.getvalue()).hexdigest(),), limit)


def direct(folder: Path, image: Image.Image, prompt: str = "Describe the image") -> str | None:
    """What transformers generates: text, or None where it came to no end. Image and text go in by hand, without our processor."""
    import torch
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer, model = AutoTokenizer.from_pretrained(folder), Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()
    seen = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[image], return_tensors="pt")
    slots = int(seen["image_grid_thw"][0].prod()) // 4
    text = f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * slots}<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt")
    types = (ids["input_ids"] == model.config.image_token_id).long()
    with torch.no_grad():
        made = model.generate(
            input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], mm_token_type_ids=types, **seen, max_new_tokens=LIMIT, do_sample=False
        )[0, ids["input_ids"].shape[1] :].tolist()
    ended = set(made) & set(model.generation_config.eos_token_id)
    return tokenizer.decode(made, skip_special_tokens=True).strip() if ended else None


def test_answers_are_those_of_transformers(chat_folder: Path, tmp_path: Path) -> None:
    images = pictures(8)
    model = LocalChat(str(chat_folder), "w")
    answers = model.ask("caption", [question(image) for image in images], Responses(tmp_path))
    wanted = [direct(chat_folder, image) for image in images]
    assert [answer.value for answer in answers] == wanted
    assert model.name == "tiny-vl"
    assert len({text for text in wanted if text}) > 2  # it looks at the picture
    cut = [answer for answer, text in zip(answers, wanted, strict=True) if text is None]
    assert all("cut off" in answer.error and not answer.retry for answer in cut)


def test_a_left_padded_batch_says_what_each_question_alone_says(chat_folder: Path) -> None:
    loaded = local._load(str(chat_folder), None)
    questions = [question(image, "Describe the image " * (1 + number)) for number, image in enumerate(pictures(4))]
    together = [str(answer) for answer in loaded.generate(questions, LIMIT)]
    assert together == [str(loaded.generate([one], LIMIT)[0]) for one in questions]


def test_nothing_is_asked_twice_and_other_words_or_weights_are(chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = local._Loaded.generate
    monkeypatch.setattr(local._Loaded, "generate", lambda self, questions, limit: asked.extend(questions) or real(self, questions, limit))
    images, responses = pictures(3), Responses(tmp_path)
    first = LocalChat(str(chat_folder), "w").ask("caption", [question(image) for image in images[:2]], responses)
    again = LocalChat(str(chat_folder), "w").ask("caption", [question(image) for image in images], responses)
    assert again[:2] == first and len(asked) == 3
    LocalChat(str(chat_folder), "w").ask("caption", [question(images[0], "Say it")], responses)
    LocalChat(str(chat_folder), "other weights").ask("caption", [question(images[0])], responses)
    assert len(asked) == 5


def test_a_picture_that_cannot_be_read_costs_its_own_answer_alone(chat_folder: Path, tmp_path: Path) -> None:
    good = question(pictures(1)[0])
    bad = Question(good.prompt, (b"no image",), ("bad",), LIMIT)
    answers = LocalChat(str(chat_folder), "w").ask("caption", [good, bad, good], Responses(tmp_path))
    assert "UnidentifiedImageError" in answers[1].error and not answers[1].retry
    assert answers[0] == answers[2] and answers[0].value == direct(chat_folder, pictures(1)[0])


def test_nothing_is_loaded_where_nothing_is_open(tmp_path: Path) -> None:
    assert LocalChat("/nowhere/at-all", "w").ask("caption", [], Responses(tmp_path)) == []


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_the_chat_template_may_lie_in_its_own_file(chat_folder: Path, tmp_path: Path, name: str) -> None:
    import shutil

    folder = Path(shutil.copytree(chat_folder, tmp_path / "model"))
    for file in folder.glob("chat_template*"):
        file.unlink()
    with pytest.raises(ValueError, match="has no chat template: copy chat_template.jinja"):
        local.load_processor(str(folder), None)
    (folder / name).write_text(CHAT_TEMPLATE if name.endswith("jinja") else json.dumps({"chat_template": CHAT_TEMPLATE}))
    processor = local.load_processor(str(folder), None)
    written = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hello"}]}], tokenize=False)
    assert written == "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hello<|im_end|>\n"
