"""A tiny Qwen3-VL-shaped chat model of the real class with random weights, in the layout of a released one."""

from __future__ import annotations

from pathlib import Path

import pytest

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen3-VL's, without tools and system line."""


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    from trainers.components.text_encoder import IMAGE_PX, PATCH_PX, text_encoder_config
    from trainers.components.tokenizer import build_processor, build_tokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("chat") / "tiny-vl"
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    model = Qwen3VLForConditionalGeneration(text_encoder_config(tokenizer, hidden=64, layers=2, vision_layers=1, vision_hidden=32))
    with torch.no_grad():  # as drawn by transformers a model this narrow says the same of everything
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    # A random model never ends by itself: one token in six counts as its end.
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(500, 600)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    build_processor(tokenizer, image_px=IMAGE_PX, patch_px=PATCH_PX).image_processor.save_pretrained(folder)
    return folder
