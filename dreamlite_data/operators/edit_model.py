"""Edits by models: a diffusers pipeline makes several pictures for an instruction, a reward chooses among them.
Both load from folders with the first picture, from safetensors only, once per worker; pictures and rewards are kept per call."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreamlite_data.images import decode_stored, encode_png
from dreamlite_data.inference import worker_threads
from dreamlite_data.operators.caption import Picture
from dreamlite_data.operators.change import LEAST_CHANGE, Pixels, changed_pixels
from dreamlite_data.operators.draw import draw_bits
from dreamlite_data.operators.edit import Request, Try
from dreamlite_data.operators.score import reward_model
from dreamlite_data.pictures import Pictures
from dreamlite_data.responses import Call, CallFailed, Responses


class EditModelError(RuntimeError):
    """A model cannot be used as it is configured; the message says which folder and why."""


class PipelineEditor:
    """Any diffusers pipeline by folder whose call takes `prompt` and `image`. It makes `tries` pictures from seeds of (image,
    instruction, number); the reward keeps the best, and the others are rejected with the reason. A picture is kept in
    `pictures` under (image, instruction, weights, seed), what the reward gave it in `responses`: neither is made twice."""

    name = "model"

    def __init__(
        self, folder: Path | str, weights: str, tries: int, inference_steps: int, pictures: Pictures, responses: Responses, *,
        device: str = "cpu", reward: Path | str | None = None, reward_weights: str = "", min_reward: float | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.weights, self.count, self.steps, self.device = str(folder), weights, tries, inference_steps, device
        self.pictures, self.responses = pictures, responses
        self.reward, self.reward_weights, self.min_reward = str(reward) if reward else None, reward_weights, min_reward
        settings = f"tries={tries} steps={inference_steps} min_reward={min_reward}"
        self.digest = f"{weights} {reward_weights} {settings}"

    def prepare(self, pictures: Sequence[Picture], wanted: Sequence[Sequence[str]] = ()) -> None:
        """Load pipeline and reward, and make room; raises EditModelError or RewardCheckpointError where there is no model."""
        _pipeline(self.folder, self.device)
        if self.reward is not None:
            reward_model(self.reward)
        self.pictures.trim()

    def tries(self, pixels: Pixels, image_id: str, request: Request) -> list[Try]:
        """As in Editor: one try a seed, all but the best rejected."""
        with worker_threads():
            payloads = [self._picture(pixels, image_id, request.instruction, number) for number in range(self.count)]
            made = [decode_stored(payload) for payload in payloads]
            rewards = [self._reward(pixels, image_id, *pair, request.instruction) for pair in zip(payloads, made, strict=True)]
        reasons = choose(pixels, made, rewards, self.min_reward)
        return [Try(request, picture, reject_reason=reason) for picture, reason in zip(made, reasons, strict=True)]

    def _picture(self, pixels: Pixels, image_id: str, instruction: str, number: int) -> bytes:
        """The PNG of one seed, kept or made now."""
        seed = draw_bits("edit model", image_id, instruction, number) % 2**63
        call = Call("edit", self.weights, instruction, {"steps": self.steps, "seed": seed}, (image_id,))
        payload = self.pictures.find(call)
        if payload is None:
            payload = encode_png(self._make(pixels, instruction, seed))
            self.pictures.keep(call, payload)
        return payload

    def _make(self, pixels: Pixels, instruction: str, seed: int) -> Pixels:
        import torch

        pipeline = _pipeline(self.folder, self.device)
        height, width = pixels.shape[:2]
        wanted = {"num_inference_steps": self.steps, "height": height, "width": width, "generator": torch.Generator("cpu").manual_seed(seed)}
        accepted = inspect.signature(pipeline.__call__).parameters
        picture = pipeline(prompt=instruction, image=Image.fromarray(pixels), **{name: value for name, value in wanted.items() if name in accepted})
        made = np.asarray(picture.images[0].convert("RGB"))
        if made.shape != pixels.shape:
            made = np.asarray(picture.images[0].convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
        return made

    def _reward(self, pixels: Pixels, image_id: str, payload: bytes, made: Pixels, instruction: str) -> float | None:
        """What the reward gives one picture, kept or asked now; None without a reward, or where it cannot score it. Each is
        scored alone, so that its last bit does not depend on which of the others were kept."""
        if self.reward is None:
            return None
        call = Call("judge", self.reward_weights, instruction, {}, (image_id, hashlib.sha256(payload).hexdigest()))
        return self.responses.answer(call, lambda: self._judge(pixels, made, instruction)).value

    def _judge(self, pixels: Pixels, made: Pixels, instruction: str) -> float:
        scores = reward_model(self.reward).score([Image.fromarray(made)], [instruction], [Image.fromarray(pixels)])
        if scores.errors[0]:
            raise CallFailed(scores.errors[0])
        return float(scores.mu[0])


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
