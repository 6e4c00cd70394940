"""From a prompt (and a source image) to what the UNet attends to: exact strings, hidden states, drop lengths.
The strings and their order are part of every checkpoint: training and the stock pipelines must agree byte for byte."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from trainers.processor import SquareImageProcessor

HiddenState = Literal["pre_norm", "post_norm"]

# Strings of the released pipelines (diffusers 0.42.1, pipelines/dreamlite): compatibility depends on each byte.
GENERATE_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
EDIT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
)
GENERATE_PROMPT = "[Generate]: {}"
EDIT_PROMPT = (
    "[Edit]: A diptych with two side-by-side images of the same scene. Compared to the right side, the left one has {}"
)
GENERATE_TOKENS = 200
"""Tokens after the prefix that the stock pipelines read of a text-to-image prompt (`max_sequence_length`); of an edit they read all."""
GENERATE_DROP, EDIT_DROP = 34, 64  # prefix tokens: system block and user header, with the Qwen vocabulary
ENCODER_INPUT_PX = 512  # the stock pipelines squeeze the source to this square before the processor sees it


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Kept hidden states [B, L, D] float32, right-padded with zeros, and their mask [B, L] (1 = token)."""

    states: torch.Tensor
    mask: torch.Tensor

    def rows(self) -> list[torch.Tensor]:
        """One [L_i, D] tensor a row, without padding."""
        return [states[mask.bool()] for states, mask in zip(self.states, self.mask, strict=True)]

    def to(self, device: torch.device | str) -> Embeddings:
        """The same rows on a device."""
        return Embeddings(self.states.to(device), self.mask.to(device))


def stack(rows: list[torch.Tensor]) -> Embeddings:
    """Right-pad rows [L_i, D] to one batch."""
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows], batch_first=True)
    return Embeddings(pad_sequence(list(rows), batch_first=True), mask)


class PromptEncoder:
    """The frozen Qwen3-VL encoder behind both tasks.

    `hidden_state` says which tensor of the last decoder layer is taken: `pre_norm` (what the released weights were
    trained on) or `post_norm` (what the stock pipelines feed on transformers 5).
    """

    def __init__(
        self,
        text_encoder: Qwen3VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        processor: SquareImageProcessor,
        hidden_state: HiddenState,
    ) -> None:
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.processor = processor
        self.hidden_state = hidden_state
        self.drop = check_drop_lengths(tokenizer)

    @classmethod
    def load(cls, folder: Path, hidden_state: HiddenState) -> PromptEncoder:
        """Load from a components or checkpoint folder with text_encoder/, tokenizer/ and processor/."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        processor = SquareImageProcessor(
            Qwen2VLImageProcessorPil.from_pretrained(folder / "processor"), tokenizer
        )
        model = Qwen3VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        return cls(model, tokenizer, processor, hidden_state)

    def to(self, device: torch.device) -> PromptEncoder:
        """Move the network to a device, where its states come out, and return this encoder."""
        self.text_encoder.to(device)
        return self

    def generate(self, prompts: list[str | None]) -> Embeddings:
        """Embed text-to-image prompts; None stands for the null prompt (the template with empty user text). What is longer than the
        stock pipelines read is cut as they cut it."""
        users = ["" if prompt is None else GENERATE_PROMPT.format(prompt) for prompt in prompts]
        inputs = self.tokenizer(
            [GENERATE_TEMPLATE.replace("{}", user) for user in users], padding=True, return_tensors="pt"
        )
        ids, mask = _cut(inputs["input_ids"], inputs["attention_mask"], self.drop["generate"] + GENERATE_TOKENS, self.tokenizer.pad_token_id)
        return self._kept(ids, mask, self.drop["generate"])

    def edit(self, images: list[Image.Image], prompts: list[str | None]) -> Embeddings:
        """Embed edit instructions with their source images; None is the null prompt, which still sees the image."""
        users = ["" if prompt is None else EDIT_PROMPT.format(prompt) for prompt in prompts]
        # A row and its null prompt share a source: each picture is resized once (that costs as much as the model).
        places = {id(image): place for place, image in reversed(list(enumerate(images)))}
        order = sorted(set(places.values()))
        pictures = self.processor.image_processor(
            [encoder_image(images[place]) for place in order], return_tensors="pt"
        )
        shared = [order.index(places[id(image)]) for image in images]
        grids = pictures["image_grid_thw"][shared]
        patches = pictures["pixel_values"].split(pictures["image_grid_thw"].prod(1).tolist())
        merge = self.processor.image_processor.merge_size**2
        texts = [
            EDIT_TEMPLATE.replace("<|image_pad|>", "<|image_pad|>" * (int(grid.prod()) // merge)).replace("{}", user)
            for grid, user in zip(grids, users, strict=True)
        ]
        inputs = self.tokenizer(texts, padding=True, return_tensors="pt")
        vision = {
            "pixel_values": torch.cat([patches[index] for index in shared]),
            "image_grid_thw": grids,
            "mm_token_type_ids": (inputs["input_ids"] == self.processor.image_token_id).long(),
        }
        return self._kept(inputs["input_ids"], inputs["attention_mask"], self.drop["edit"], **vision)

    @torch.no_grad()
    def _kept(self, ids: torch.Tensor, mask: torch.Tensor, drop: int, **vision: torch.Tensor) -> Embeddings:
        device = self.text_encoder.device
        ids, mask, vision = ids.to(device), mask.to(device), {name: value.to(device) for name, value in vision.items()}
        states = hidden_states(self.text_encoder, ids, mask, self.hidden_state, **vision)
        return stack([row[keep.bool()][drop:] for row, keep in zip(states, mask, strict=True)])


def _cut(ids: torch.Tensor, mask: torch.Tensor, length: int, padding_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, L] of at most `length` tokens a row, padded on the right. Not by the tokenizer, which would remember the limit
    for every thread that shares it."""
    if ids.shape[1] <= length:
        return ids, mask
    rows = [row[keep.bool()][:length] for row, keep in zip(ids, mask, strict=True)]
    ids = pad_sequence(rows, batch_first=True, padding_value=padding_id)
    return ids, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)


def hidden_states(
    model: Qwen3VLForConditionalGeneration,
    ids: torch.Tensor,
    mask: torch.Tensor,
    hidden_state: HiddenState,
    **vision: torch.Tensor,
) -> torch.Tensor:
    """Last-layer states [B, L, D], before or after the final norm.

    Taken by a hook on the last decoder layer and not from `hidden_states[-1]`, whose meaning changed between
    transformers 4.57 (before the norm) and 5 (after it).
    """
    captured: list[torch.Tensor] = []
    layer, caller = model.model.language_model.layers[-1], threading.get_ident()

    def capture(_module: torch.nn.Module, _inputs: tuple, output: torch.Tensor | tuple) -> None:
        if threading.get_ident() == caller:  # other threads may run the same model now
            captured.append(output[0] if isinstance(output, tuple) else output)

    handle = layer.register_forward_hook(capture)
    try:
        output = model.model(input_ids=ids, attention_mask=mask, use_cache=False, **vision)
    finally:
        handle.remove()
    return captured[0] if hidden_state == "pre_norm" else output.last_hidden_state


def encoder_image(image: Image.Image) -> Image.Image:
    """The source as the encoder sees it: squeezed to the stock pipelines' square with Lanczos."""
    return image.convert("RGB").resize((ENCODER_INPUT_PX, ENCODER_INPUT_PX), Image.Resampling.LANCZOS)


def encoder_grid_px(images: Qwen2VLImageProcessorPil) -> int:
    """Side (px) of the square that the stock pipelines' source square becomes before it is cut into patches."""
    factor = images.patch_size * images.merge_size
    return smart_resize(ENCODER_INPUT_PX, ENCODER_INPUT_PX, factor, images.size["shortest_edge"], images.size["longest_edge"])[0]


def check_drop_lengths(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Measure the prefix lengths of both templates and compare with what the stock pipelines drop.

    Raises ValueError where the vocabulary splits the templates differently: such a checkpoint would feed the UNet
    a shifted window of tokens without any other sign.
    """
    ends = {"generate": (GENERATE_TEMPLATE, "{}"), "edit": (EDIT_TEMPLATE, "<|vision_start|>")}
    found = {
        task: len(tokenizer(template[: template.index(mark)])["input_ids"]) for task, (template, mark) in ends.items()
    }
    if found != {"generate": GENERATE_DROP, "edit": EDIT_DROP}:
        raise ValueError(
            f"the tokenizer splits the prompt templates into prefixes of {found['generate']} and {found['edit']} tokens,"
            f" but the pipelines drop {GENERATE_DROP} and {EDIT_DROP}: use the vocabulary that the checkpoint names"
        )
    return found


def as_image(pixels: np.ndarray) -> Image.Image:
    """uint8 [H, W, 3] as an RGB image."""
    return Image.fromarray(pixels, "RGB")
