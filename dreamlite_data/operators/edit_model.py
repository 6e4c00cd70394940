"""Edits by models: a vision-language model proposes instructions, a diffusers pipeline makes the pictures, a reward chooses.
Models load from folders with the first picture, from safetensors only, and once per worker."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreamlite_data.chat.local import load_processor
from dreamlite_data.inference import worker_threads
from dreamlite_data.operators.change import LEAST_CHANGE, Pixels, changed_pixels
from dreamlite_data.operators.draw import draw_bits
from dreamlite_data.operators.edit import Form, Request, Try
from dreamlite_data.operators.score import reward_model
from dreamlite_data.taxonomy import UNMAPPED, load_taxonomy

PROMPT = (
    "Propose {count} different edits of this picture, each grounded in what it shows. Write one per line, as type: instruction. "
    "The type is one of {types}. The instruction is one plain imperative sentence of at most 25 words."
)
MIN_CHARACTERS, MAX_CHARACTERS = 4, 300
_LINE = re.compile(r"^\s*(?:[-*]|\d+[.)])?\s*(?:\**([A-Za-z][A-Za-z_ /-]{1,30}?)\**\s*:)?\s*(.+?)\s*$")


class EditModelError(RuntimeError):
    """A model cannot be used as it is configured; the message says which folder and why."""


def _prompt_id(prompt: str) -> str:
    return f"vlm/{hashlib.sha256(prompt.encode()).hexdigest()[:12]}"


class VlmInstructor:
    """An image-text-to-text model of transformers by folder. Its answer is read line by line; each line that is a sentence of
    sensible length is a request, with the type it names, or unmapped."""

    name = "vlm"

    def __init__(self, folder: Path | str, weights: str, count: int, max_new_tokens: int = 256, device: str = "cpu") -> None:
        self.folder, self.count, self.max_new_tokens, self.device = str(folder), count, max_new_tokens, device
        types = ", ".join(sorted({level2 for names in load_taxonomy().levels.values() for level2 in names}))
        self.prompt = PROMPT.format(count=count, types=types)
        self.prompt_id = _prompt_id(self.prompt)
        self.digest = f"{weights} {self.prompt_id} {max_new_tokens}"

    def prepare(self) -> None:
        """Load the model; raises EditModelError where there is none."""
        _vlm(self.folder, self.device)

    def requests(self, pixels: Pixels, image_id: str, wanted: Sequence[str] = ()) -> Iterable[Request]:
        count, prompt = self.count, self.prompt
        if wanted:  # by a plan: only these types are asked for, for no other would be taken
            count, prompt = len(wanted), PROMPT.format(count=len(wanted), types=", ".join(sorted(set(wanted))))
        for edit_type, words in parse_proposals(self.answer(pixels, prompt))[:count]:
            form = Form("long" if len(words.split()) > 12 else "short", words, _prompt_id(prompt))
            yield Request(edit_type, words, (form,))

    def answer(self, pixels: Pixels, prompt: str | None = None) -> str:
        """What the model says to the prompt (by default its own), decoded greedily: equal pictures give equal words."""
        import torch

        model, processor = _vlm(self.folder, self.device)
        image = {"type": "image", "image": Image.fromarray(pixels)}
        messages = [{"role": "user", "content": [image, {"type": "text", "text": prompt or self.prompt}]}]
        with worker_threads(), torch.inference_mode():
            inputs = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ).to(self.device)
            tokens = model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def parse_proposals(answer: str) -> list[tuple[str, str]]:
    """(edit type, instruction) of every usable line of a model's answer, each instruction once. A type that the taxonomy does
    not know is 'unmapped'; control characters and lines that are no sentence are passed over."""
    found: dict[str, tuple[str, str]] = {}
    for line in answer.splitlines():
        match = _LINE.match("".join(character for character in line if character.isprintable()))
        if match is None:
            continue
        label, words = match.groups()
        words = words.strip(" \"'*")
        known = label is not None and load_taxonomy().edit_type(label).level1 != UNMAPPED
        if label is not None and not known:
            words = f"{label}: {words}" if " " in label else words  # a colon within the sentence, not a type before it
        if MIN_CHARACTERS <= len(words) <= MAX_CHARACTERS and any(character.isalpha() for character in words):
            found.setdefault(words.lower(), (label.strip().lower() if known and label else UNMAPPED, words))
    return list(found.values())


class PipelineEditor:
    """Any diffusers pipeline by folder whose call takes `prompt` and `image`. It makes `tries` pictures from seeds of (image,
    instruction, number); the reward keeps the best, and the others are rejected with the reason."""

    name = "model"

    def __init__(
        self, folder: Path | str, weights: str, tries: int, inference_steps: int, device: str = "cpu", reward: Path | str | None = None,
        reward_weights: str = "", min_reward: float | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.count, self.steps, self.device = str(folder), tries, inference_steps, device
        self.reward, self.min_reward = str(reward) if reward else None, min_reward
        settings = f"tries={tries} steps={inference_steps} min_reward={min_reward}"
        self.digest = f"{weights} {reward_weights} {settings}"

    def prepare(self) -> None:
        """Load pipeline and reward; raises EditModelError or RewardCheckpointError where there is none."""
        _pipeline(self.folder, self.device)
        if self.reward is not None:
            reward_model(self.reward)

    def tries(self, pixels: Pixels, image_id: str, request: Request) -> list[Try]:
        with worker_threads():
            pictures = [self._picture(pixels, image_id, request.instruction, number) for number in range(self.count)]
            rewards = self._rewards(pixels, pictures, request.instruction)
        return [
            Try(request, picture, reject_reason=reason)
            for picture, reason in zip(pictures, choose(pixels, pictures, rewards, self.min_reward), strict=True)
        ]

    def _picture(self, pixels: Pixels, image_id: str, instruction: str, number: int) -> Pixels:
        import torch

        pipeline = _pipeline(self.folder, self.device)
        seed = draw_bits("edit model", image_id, instruction, number) % 2**63
        height, width = pixels.shape[:2]
        wanted = {"num_inference_steps": self.steps, "height": height, "width": width, "generator": torch.Generator("cpu").manual_seed(seed)}
        accepted = inspect.signature(pipeline.__call__).parameters
        picture = pipeline(prompt=instruction, image=Image.fromarray(pixels), **{name: value for name, value in wanted.items() if name in accepted})
        made = np.asarray(picture.images[0].convert("RGB"))
        if made.shape != pixels.shape:
            made = np.asarray(picture.images[0].convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
        return made

    def _rewards(self, pixels: Pixels, pictures: list[Pixels], instruction: str) -> list[float | None]:
        if self.reward is None:
            return [None] * len(pictures)
        source = Image.fromarray(pixels)
        scores = reward_model(self.reward).score([Image.fromarray(one) for one in pictures], [instruction] * len(pictures), [source] * len(pictures))
        return [None if error else float(mu) for mu, error in zip(scores.mu, scores.errors, strict=True)]


def choose(source: Pixels, pictures: list[Pixels], rewards: list[float | None], min_reward: float | None) -> list[str | None]:
    """Why each picture is rejected, None for the one that is kept. What changed nothing and what could not be scored is out;
    of the rest the highest reward wins, the earlier try where two are equal, if it reaches `min_reward`."""
    reasons: list[str | None] = []
    scored = any(reward is not None for reward in rewards)
    for picture, reward in zip(pictures, rewards, strict=True):
        changed = float(changed_pixels(source, picture).mean())
        if changed < LEAST_CHANGE:
            reasons.append(f"no_op: {changed:.4f} of the pixels changed")
        elif scored and (reward is None or not np.isfinite(reward)):
            reasons.append("no_reward: the picture could not be scored")
        elif min_reward is not None and (reward is None or reward < min_reward):
            reasons.append(f"low_reward: {reward:.4f} < {min_reward:.4f}" if reward is not None else "no_reward: nothing scored it")
        else:
            reasons.append(None)
    standing = [index for index, reason in enumerate(reasons) if reason is None]
    if not standing:
        return reasons
    best = max(standing, key=lambda index: (rewards[index] if rewards[index] is not None else 0.0, -index))
    for index in standing:
        if index != best:
            reasons[index] = f"not_best: {rewards[index]:.4f} <= {rewards[best]:.4f}" if scored else "not_best: an earlier try was kept"
    return reasons


# --- loading ---------------------------------------------------------------------------------------------------------


@functools.cache
def _vlm(folder: str, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText

    try:
        processor = load_processor(folder, None)
        model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype="auto")
    except (OSError, ValueError, KeyError) as error:
        raise EditModelError(f"{folder} holds no image-text-to-text model with its processor: {error}") from error
    return model.to(device).eval(), processor


@functools.cache
def _pipeline(folder: str, device: str) -> Any:
    from diffusers import DiffusionPipeline

    try:
        pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise EditModelError(f"{folder} holds no diffusers pipeline: {error}") from error
    missing = {"prompt", "image"} - set(inspect.signature(pipeline.__call__).parameters)
    if missing:
        raise EditModelError(f"the pipeline in {folder} ({type(pipeline).__name__}) takes no {' and no '.join(sorted(missing))}: it cannot edit")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)
