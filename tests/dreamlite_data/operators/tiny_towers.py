"""Tiny CLIP- and SigLIP-class checkpoints of the real classes, with random weights and a real tokenizer, built offline.
Saved in the layout of released ones: config, weights, image processor, tokenizer."""

from __future__ import annotations

from pathlib import Path

from dreamlite_data import scenes

SIDE_PX, TEXT_TOKENS = 32, 24
WORDS = [*scenes.COLOURS, *scenes.SHAPES, *scenes.SIZES, *scenes.BACKGROUNDS, *scenes.STYLES, "a", "at", "the", "on", "with", "and", "photo"]


def build_tokenizer(start: bool):
    """A word-level tokenizer that ends (and, for CLIP, opens) each text as the originals do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *sorted(set(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>" if start else "$A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=TEXT_TOKENS
    )


def tiny_clip(folder: Path, seed: int = 0) -> Path:
    import torch
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(seed)
    tokenizer = build_tokenizer(start=True)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": TEXT_TOKENS, "eos_token_id": 2, "bos_token_id": 1,
                     "pad_token_id": 0},
        vision_config={**sizes, "image_size": SIDE_PX, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE_PX}, crop_size={"height": SIDE_PX, "width": SIDE_PX}).save_pretrained(folder)
    return folder


def tiny_siglip(folder: Path, seed: int = 0) -> Path:
    import torch
    from transformers import SiglipConfig, SiglipModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    torch.manual_seed(seed)
    tokenizer = build_tokenizer(start=False)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": TEXT_TOKENS, "projection_size": 32},
        vision_config={**sizes, "image_size": SIDE_PX, "patch_size": 8},
    )
    SiglipModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": SIDE_PX, "width": SIDE_PX}).save_pretrained(folder)
    return folder
