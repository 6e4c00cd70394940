"""Tiny untrained parts of the real classes, saved and loaded like trained ones.
Session-wide: building them takes a second or two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler
from transformers import Qwen3VLForConditionalGeneration

from trainers.components.text_encoder import IMAGE_PX, PATCH_PX, text_encoder_config
from trainers.components.tokenizer import build_processor, build_tokenizer
from trainers.flow import SCHEDULER_CONFIG
from trainers.model import build_unet, save_checkpoint
from trainers.settings import ModelSettings

TINY_MODEL = ModelSettings(channels=(32, 64), head_width=16, attention_at_full_resolution=False)
"""All block types of the official network, so that what holds here holds for it."""


def same(left: object, right: object) -> bool:
    """Whether two states are equal to the last bit, whatever they nest."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[name]) for name, value in left.items())
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@pytest.fixture(scope="session")
def components(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("components")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    build_processor(tokenizer, image_px=IMAGE_PX, patch_px=PATCH_PX).save_pretrained(folder / "processor")
    config = text_encoder_config(tokenizer, hidden=64, layers=2, vision_layers=1, vision_hidden=32)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder / "text_encoder")
    AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="session")
def checkpoints(components: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint for the base pipeline and one for the mobile pipeline, of the same weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    unet = build_unet(TINY_MODEL, 64, 8, seed=1)
    for name, steps in (("base", None), ("mobile", 4)):
        facts = {"stage": name, "hidden_state": "post_norm", "size_px": 64, "distilled_steps": steps}
        save_checkpoint(unet, components, folder / name, facts=facts, distilled=steps is not None)
    return {"base": folder / "base", "mobile": folder / "mobile"}
