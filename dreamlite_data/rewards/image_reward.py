"""ImageReward (arXiv 2304.05977): BLIP's image-grounded text encoder and a linear head on its first token.
The released `ImageReward.pt` is in BLIP's own layout; it is mapped to transformers' BLIP key by key."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreamlite_data.rewards.square_scorer import SquarePacker, SquareScorer
from dreamlite_data.rewards.squares import Square
from dreamlite_data.rewards.stored import RewardCheckpointError
from dreamlite_data.rewards.strict import fill, find_file, read_state
from dreamlite_data.rewards.towers import load_tokenizer

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw reward, from the released code: scores are (raw - MEAN) / STD."""
TEXT_TOKENS = 35
HEAD_WIDTH = 64  # of the vision tower: BLIP's ViT-B has 12 heads of it, its ViT-L 16
VISION_EPS, TEXT_EPS = 1e-6, 1e-12
MED_CONFIG = "med_config.json"
DROPPED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")
"""BLIP's contrastive projections, which no reward reads, and positions that are 0, 1, 2, ..."""

VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
IN_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class ImageRewardNetwork(nn.Module):
    """Vision tower, text encoder with cross-attention, and linear layers without activations between them."""

    def __init__(self, vision: Any, text: Any, widths: list[tuple[int, int, int]]) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        # Dropout of the training stood between them; its places keep the stored numbers.
        self.mlp = nn.ModuleDict({str(place): nn.Linear(before, after) for place, before, after in widths})

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Raw rewards float32 [B]."""
        image = self.vision(pixel_values=pixels).last_hidden_state
        seen = torch.ones(image.shape[:-1], dtype=torch.long, device=image.device)
        text = self.text(
            input_ids=ids, attention_mask=mask.long(), encoder_hidden_states=image, encoder_attention_mask=seen, is_decoder=False
        ).last_hidden_state
        value = text[:, 0].float()
        for layer in self.mlp.values():
            value = layer(value)
        return value[:, 0]


class ImageReward(SquareScorer):
    """How well an image does for its prompt; about standard normal over its training images."""

    kind = "imagereward"

    def mu(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return (self.network(pixels, ids, mask) - MEAN) / STD


def our_key(key: str) -> str | None:
    """The name in our network of a released key; None for dead weights. An unknown name stays, to be reported."""
    if DROPPED.fullmatch(key):
        return None
    block = re.fullmatch(r"blip\.visual_encoder\.blocks\.(\d+)\.(.+)\.(weight|bias)", key)
    if block and block[2] in IN_BLOCK:
        return f"vision.encoder.layers.{block[1]}.{IN_BLOCK[block[2]]}.{block[3]}"
    if key.startswith("blip.visual_encoder."):
        name = key.removeprefix("blip.visual_encoder.")
        return f"vision.{VISION[name]}" if name in VISION else key
    if key.startswith("blip.text_encoder."):
        return key.replace("blip.text_encoder.", "text.", 1)
    return re.sub(r"^mlp\.layers\.", "mlp.", key)


def load_image_reward(folder: Path, dtype: torch.dtype) -> ImageRewardNetwork:
    """The network of a folder with `ImageReward.pt` and `med_config.json`, strictly. Raises RewardCheckpointError."""
    path = find_file(folder, ("*.pt", "*.pth", "*.safetensors"), "the checkpoint of ImageReward")
    state = read_state(path)
    mapped = {name: value for key, value in state.items() if (name := our_key(key)) is not None}
    vision, text = _configs(folder, path, state)
    widths = [
        (int(found[1]), *reversed(value.shape))
        for key, value in state.items()
        if (found := re.fullmatch(r"mlp\.layers\.(\d+)\.weight", key))
    ]
    if not widths:
        raise RewardCheckpointError(f"{path} has no reward head (looked for mlp.layers.*): give the released ImageReward.pt")
    with torch.device("meta"):
        network = ImageRewardNetwork(vision, text, sorted(widths))
    fill(network, mapped, path, dtype=dtype, heads=("mlp.",))
    return network


def image_reward_packer(folder: Path) -> SquarePacker:
    """Decoding and tokenizing without a weight: the side of the image from the stored positions, words with BERT's tokenizer."""
    path = find_file(folder, ("*.pt", "*.pth", "*.safetensors"), "the checkpoint of ImageReward")
    side_px, patch_px, _ = _vision_facts(read_state(path), path)
    # Its two added tokens, [DEC] and [ENC], never stand in a prompt, so BERT's plain tokenizer gives the same ids.
    return SquarePacker(Square(side_px, "crop", "round"), patch_px, load_tokenizer(folder), TEXT_TOKENS)


def _vision_facts(state: Mapping[str, Tensor], path: Path) -> tuple[int, int, int]:
    """(side in pixels, patch in pixels, width) of the vision tower."""
    try:
        patch, positions = state["blip.visual_encoder.patch_embed.proj.weight"], state["blip.visual_encoder.pos_embed"]
    except KeyError as error:
        raise RewardCheckpointError(f"{path} has no {error.args[0]}: give the released ImageReward.pt") from None
    return int((positions.shape[1] - 1) ** 0.5) * patch.shape[-1], patch.shape[-1], patch.shape[0]


def _configs(folder: Path, path: Path, state: Mapping[str, Tensor]) -> tuple[Any, Any]:
    from transformers import BlipTextConfig, BlipVisionConfig

    if not (Path(folder) / MED_CONFIG).exists():
        raise RewardCheckpointError(f"{folder} has no {MED_CONFIG}: it is released beside ImageReward.pt")
    med = json.loads((Path(folder) / MED_CONFIG).read_text("utf-8"))
    side_px, patch_px, width = _vision_facts(state, path)
    layers = {int(found[1]) for key in state if (found := re.match(r"blip\.visual_encoder\.blocks\.(\d+)\.", key))}
    inner = state["blip.visual_encoder.blocks.0.mlp.fc1.weight"].shape[0]
    vision = BlipVisionConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=len(layers), num_attention_heads=max(1, width // HEAD_WIDTH),
        image_size=side_px, patch_size=patch_px, layer_norm_eps=VISION_EPS, hidden_act="gelu", attention_dropout=0.0,
    )  # fmt: skip
    text = BlipTextConfig(
        # The released config says 30522 or 30524; the embedding knows.
        vocab_size=state["blip.text_encoder.embeddings.word_embeddings.weight"].shape[0], encoder_hidden_size=width,
        hidden_size=med["hidden_size"], intermediate_size=med["intermediate_size"], num_hidden_layers=med["num_hidden_layers"],
        num_attention_heads=med["num_attention_heads"], max_position_embeddings=med["max_position_embeddings"],
        hidden_act=med.get("hidden_act", "gelu"), layer_norm_eps=med.get("layer_norm_eps", TEXT_EPS), is_decoder=True,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=med.get("pad_token_id", 0),
        bos_token_id=None, eos_token_id=None, sep_token_id=None,
    )  # fmt: skip
    return vision, text
