"""Build the small world's tokenizer and processor offline: a byte-level BPE with Qwen's splitting rule.
Each word of the prompt templates becomes one token, so that the stock pipelines' drop lengths hold."""

from __future__ import annotations

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dreamlite_data import scenes
from trainers.conditioning import EDIT_PROMPT, EDIT_TEMPLATE, GENERATE_PROMPT, GENERATE_TEMPLATE
from trainers.processor import SquareImageProcessor

# The splitting rule of the Qwen2/Qwen3 tokenizers (tokenizer.json, Apache-2.0).
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip


def build_tokenizer(corpus: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Train the vocabulary on the templates and on `corpus` (default: the small world's captions and instructions)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4_000,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    templates = [GENERATE_TEMPLATE, EDIT_TEMPLATE, GENERATE_PROMPT, EDIT_PROMPT]
    tokenizer.train_from_iterator([_without_special(text) for text in templates * 50] + (corpus or world_corpus()), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="right"
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    return fast


def build_processor(tokenizer: PreTrainedTokenizerFast, *, image_px: int, patch_px: int) -> SquareImageProcessor:
    """The image half: every source is resized to `image_px` squared and cut into patches of `patch_px`."""
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": image_px**2, "longest_edge": image_px**2},
        patch_size=patch_px,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return SquareImageProcessor(image_processor, tokenizer)


def world_corpus(count: int = 600, seed: int = 0) -> list[str]:
    """Captions and instructions that together use every word of the small world."""
    rng = np.random.default_rng(seed)
    texts = []
    for index in range(count):
        scene = scenes.sample_scene(rng, object_count=2)
        edit = scenes.sample_edit(scene, rng, scenes.EDIT_KINDS[index % len(scenes.EDIT_KINDS)])
        texts += [scenes.caption(scene, rng), " " + scenes.instruction(edit, scene, rng)]
    return texts


def _without_special(text: str) -> str:
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "\n" if token == "<|im_end|>" else "")
    return text
