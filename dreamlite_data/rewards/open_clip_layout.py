"""Names of open_clip's CLIP weights in transformers' CLIPModel.
The same network: open_clip stacks query, key and value in one matrix and keeps its two projections transposed."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

WHOLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "logit_scale": "logit_scale",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
IN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def clip_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` under transformers' names. A name that open_clip's CLIP does not have stays as it is, to be reported as unexpected."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, _, part = key.rpartition(".")
        layer = _LAYER.fullmatch(key)
        if key in WHOLE:
            found[WHOLE[key]] = value
        elif key in TRANSPOSED:
            found[TRANSPOSED[key]] = value.T.contiguous()
        elif stem in NORMS:
            found[f"{NORMS[stem]}.{part}"] = value
        elif layer:
            found |= _in_layer(f"{'vision' if layer[1] else 'text'}_model.encoder.layers.{layer[2]}", layer[3], key, value)
        else:
            found[key] = value
    return found


def _in_layer(layer: str, name: str, key: str, value: Tensor) -> dict[str, Tensor]:
    stacked = re.fullmatch(r"attn\.in_proj_(weight|bias)", name)
    if stacked:
        return {
            f"{layer}.self_attn.{part}_proj.{stacked[1]}": piece.contiguous() for part, piece in zip("qkv", value.chunk(3), strict=True)
        }
    stem, _, part = name.rpartition(".")
    return {f"{layer}.{IN_LAYER[stem]}.{part}" if stem in IN_LAYER else key: value}
