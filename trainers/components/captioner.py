"""Train the small world's captioner and instructor, one model of the Qwen3-VL class that answers by `generate`.
It captions an image in the styles of the data engine and says which edit leads from one image to another."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from dreamlite_data import scenes
from dreamlite_data.chat import LocalChat, Question
from dreamlite_data.operators.caption import scene_words
from dreamlite_data.operators.describe import prompts
from dreamlite_data.responses import Responses
from trainers.components.classes import CELLS, IGNORE
from trainers.components.initialise import initialise_narrow
from trainers.components.reward_pairs import draw_scene
from trainers.components.text_encoder import IMAGE_PX, PATCH_PX, CellHead, patchify, text_encoder_config
from trainers.components.tokenizer import build_processor, build_tokenizer, world_corpus
from trainers.loop import optimizer_step
from trainers.optimizer import Muon

DIFFERENCE = "difference"
DIFFERENCE_PROMPT = "The second image is an edit of the first. Say the edit as one short instruction. Answer with the instruction alone."
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen3-VL's turns without a system line."""
ROWS = ({"tag": 2, "short": 2, "medium": 6}, {"dense": 2}, {DIFFERENCE: 16})
"""Rows of a step by style. Each group runs alone, for its sequences are of like lengths."""
PEAK_RATE = 3e-3
WEIGHTS = {"medium": 1.0, "dense": 0.3, DIFFERENCE: 1.0, "before": 0.3}
MAX_NEW_TOKENS = 96


def questions() -> dict[str, str]:
    """What is asked, by style: the data engine's own prompts, and the one about two images."""
    return {style: asked["prompt"] for style, asked in prompts()["styles"].items()} | {DIFFERENCE: DIFFERENCE_PROMPT}


def build_captioner(
    output: Path, vision: nn.Module, *, steps: int, seed: int = 0, log: Callable[[int, dict[str, float]], None]
) -> None:
    """Train on freshly drawn scenes, with the vision tower `vision` of the text encoder (frozen), and save to `output`."""
    torch.manual_seed(seed)
    tokenizer = caption_tokenizer()
    config = text_encoder_config(tokenizer, feed_forward=2, deepstack=())
    model = Qwen3VLForConditionalGeneration(config).train()
    initialise_narrow(model, (nn.Linear,), leave=model.lm_head)
    tower = {name: value for name, value in vision.state_dict().items() if not name.startswith("deepstack")}
    model.model.visual.load_state_dict(tower)
    model.model.visual.requires_grad_(False)
    before = CellHead(config.text_config.hidden_size)
    language = model.model.language_model
    optimizer = Muon(language, before, learning_rate=PEAK_RATE, weight_decay=0.01)
    parameters = [*language.parameters(), *before.parameters()]
    for step in range(steps):
        rng = np.random.default_rng((seed, 5, step))
        optimizer.zero_grad(set_to_none=True)
        losses: dict[str, torch.Tensor] = {}
        for rows in ROWS:
            losses |= draw_batch(tokenizer, rows, rng).losses(model, before)
        sum(loss * WEIGHTS[name] for name, loss in losses.items()).backward()
        optimizer_step(optimizer, parameters, 1.0, PEAK_RATE * min(1.0, (step + 1) / 50) * max(0.01, 1 - step / steps))
        if (step + 1) % 20 == 0 or step + 1 == steps:
            log(step + 1, {name: loss.item() for name, loss in losses.items()})
    save_captioner(model, tokenizer, output)


def caption_tokenizer() -> PreTrainedTokenizerFast:
    """The small world's vocabulary with the words of the questions and of all caption styles."""
    rng = np.random.default_rng(0)
    drawn = [scenes.sample_scene(rng) for _ in range(300)]
    words = [scene_words(scene, style, "0" * 16) for scene in drawn for style in ("tag", "short", "dense")]
    tokenizer = build_tokenizer(world_corpus() + words + list(questions().values()) * 50)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class Batch:
    """Questions with images and their answers, tokenized: the loss is on the answers' tokens alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, asked: list[tuple[str, list[scenes.Scene], str]]) -> None:
        """`asked` holds (style, the scenes that its images show, answer)."""
        prompt, image = questions(), "<|vision_start|>" + "<|image_pad|>" * CELLS + "<|vision_end|>"
        heads = [f"<|im_start|>user\n{image * len(shown)}{prompt[style]}<|im_end|>\n<|im_start|>assistant\n" for style, shown, _ in asked]
        whole = [f"{head}{answer}<|im_end|>" for head, (_, _, answer) in zip(heads, asked, strict=True)]
        tokens = tokenizer(whole, padding=True, return_tensors="pt")
        self.ids, self.mask = tokens["input_ids"], tokens["attention_mask"]
        starts = torch.tensor([len(ids) for ids in tokenizer(heads).input_ids])
        answered = (torch.arange(self.ids.shape[1]) >= starts[:, None]) & self.mask.bool()
        self.labels = torch.where(answered, self.ids, IGNORE)
        self.name = asked[-1][0]
        self.pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.shown = [scene for _, several, _ in asked for scene in several]
        self.sources = [several[0] for _, several, _ in asked if len(several) == 2]

    def losses(self, model: Qwen3VLForConditionalGeneration, before: CellHead) -> dict[str, torch.Tensor]:
        """By the name of the batch's last style: mean cross-entropy of the answers' tokens. `before`, where there are pairs: what
        the tokens of the second image know of the first."""
        patches, grids = patchify(np.stack([scenes.render(scene) for scene in self.shown]))
        images = self.ids == self.pad
        states = model.model(
            input_ids=self.ids, attention_mask=self.mask, pixel_values=patches, image_grid_thw=grids, mm_token_type_ids=images.long(),
            use_cache=False,
        ).last_hidden_state  # fmt: skip
        answered = self.labels[:, 1:] != IGNORE
        losses = {self.name: F.cross_entropy(model.lm_head(states[:, :-1][answered]), self.labels[:, 1:][answered])}
        if self.sources:
            second = states[images].view(-1, 2, CELLS, states.shape[-1])[:, 1]
            losses["before"] = before.loss(second.flatten(0, 1), self.sources)
        return losses


def draw_batch(tokenizer: PreTrainedTokenizerFast, rows: dict[str, int], rng: np.random.Generator) -> Batch:
    """A batch of so many rows of each style, of scenes that are not held out."""
    asked: list[tuple[str, list[scenes.Scene], str]] = []
    for style, count in rows.items():
        for _ in range(count):
            scene = in_reading_order(draw_scene(rng, measured=False))
            if style == DIFFERENCE:
                edit = scenes.sample_edit(scene, rng)
                asked.append((style, [scene, scenes.apply_edit(scene, edit)], scenes.instruction(edit, scene)))
            else:
                asked.append((style, [scene], scene_words(scene, style, "0" * 16)))
    return Batch(tokenizer, asked)


def in_reading_order(scene: scenes.Scene) -> scenes.Scene:
    """The scene with its objects from the top left to the bottom right: the one order that an image tells."""
    objects = sorted(scene.objects, key=lambda item: scenes.POSITIONS.index(item.position))
    return scenes.Scene(tuple(objects), scene.background, scene.style)


def save_captioner(model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Weights, configuration, tokenizer, chat template and image processor: a folder that `AutoModelForImageTextToText`
    and the data engine's chat read."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
    )
    model.save_pretrained(output)
    build_processor(tokenizer, image_px=IMAGE_PX, patch_px=PATCH_PX).image_processor.save_pretrained(output)
    tokenizer.save_pretrained(output)
    file = output / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")), ensure_ascii=False, separators=(",", ":")), "utf-8")  # half the bytes


def measure_captioner(folder: Path, *, seed: int, count: int = 300) -> dict[str, float]:
    """Shares of `count` held-out scenes, asked as the data engine asks. `caption_exact`: the medium caption parses to the scene;
    `difference_exact` (and by kind of edit): the answer is the canonical instruction, word by word."""
    rng = np.random.default_rng((seed, 999_961))
    chat, asked = LocalChat(str(folder), "measured"), questions()
    drawn = [draw_scene(rng, measured=True) for _ in range(count)]
    edits = [scenes.sample_edit(scene, rng) for scene in drawn]
    targets = [scenes.apply_edit(scene, edit) for scene, edit in zip(drawn, edits, strict=True)]
    with tempfile.TemporaryDirectory() as kept:  # each question is asked once, but every chat keeps its answers
        captions = chat.ask("caption", [_question(asked["medium"], [scene]) for scene in drawn], Responses(kept))
        said = chat.ask(DIFFERENCE, [_question(asked[DIFFERENCE], both) for both in zip(drawn, targets, strict=True)], Responses(kept))
    read = [scenes.parse_caption(answer.value) if answer.value else None for answer in captions]
    exact = np.array([found is not None and found.key() == scene.key() for found, scene in zip(read, drawn, strict=True)])
    right = np.array([
        answer.value == scenes.instruction(edit, scene) for answer, edit, scene in zip(said, edits, drawn, strict=True)
    ])  # fmt: skip
    kinds = np.array([edit.kind for edit in edits])
    by_kind = {f"difference_{kind}": round(float(right[kinds == kind].mean()), 4) for kind in scenes.EDIT_KINDS}
    return {"caption_exact": round(float(exact.mean()), 4), "difference_exact": round(float(right.mean()), 4)} | by_kind


def _question(prompt: str, shown: list[scenes.Scene] | tuple[scenes.Scene, ...]) -> Question:
    payloads = []
    for scene in shown:
        Image.fromarray(scenes.render(scene)).save(buffer := io.BytesIO(), "PNG")
        payloads.append(buffer.getvalue())
    return Question(prompt, tuple(payloads), tuple(hashlib.sha256(each).hexdigest() for each in payloads), MAX_NEW_TOKENS)
