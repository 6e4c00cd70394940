"""4-bit weights for a reward model's decoder, so that a 7 B model fits a 12 GB GPU: NF4 with double quantisation.
Only linear layers of the decoder are quantised; vision tower, embeddings and norms keep their type, heads stay float32."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dreamlite_data.rewards.stored import RewardCheckpointError

if TYPE_CHECKING:
    from dreamlite_data.rewards.network import RewardNetwork

BLOCK = 64
"""Weights that share one scale (bitsandbytes' default)."""

SCALES_PER_BLOCK = 256
"""Scales, 8 bits each, that share one float32 scale of theirs: the double quantisation."""


def four_bit_bytes(elements: int) -> float:
    """Memory of a quantised matrix: half a byte a weight, and its scales."""
    return elements / 2 + elements / BLOCK * (1 + 4 / SCALES_PER_BLOCK)


def is_four_bit_target(key: str, shape: tuple[int, ...]) -> bool:
    """Whether `make_four_bit` quantises the tensor with this key of our network."""
    return key.startswith("backbone.language_model.layers.") and len(shape) == 2


def make_four_bit(network: RewardNetwork, dtype: torch.dtype) -> None:
    """Put 4-bit layers, still without weights, in the place of the decoder's linear layers; they compute in `dtype`.

    Raises RewardCheckpointError where bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RewardCheckpointError(
            "4-bit weights need the package bitsandbytes, which is not installed: pip install 'dreamlite-pipeline[four-bit]'"
        )
    from bitsandbytes.nn import Linear4bit

    for parent in list(network.backbone.language_model.layers.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                quantised = Linear4bit(
                    layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype,
                    compress_statistics=True, quant_type="nf4", device="meta",
                )  # fmt: skip
                setattr(parent, name, quantised)
    network.four_bit = True


def four_bit_weight(tensor: Tensor, layer: nn.Module, device: str | torch.device) -> nn.Parameter:
    """A weight matrix quantised on `device`, one matrix at a time: the whole model is never there in full precision."""
    from bitsandbytes.nn import Params4bit

    weight = Params4bit(tensor, requires_grad=False, blocksize=BLOCK, compress_statistics=True, quant_type="nf4", module=layer)
    return weight.to(device)


def is_four_bit(layer: nn.Module) -> bool:
    """Whether `make_four_bit` made this layer."""
    return type(layer).__module__.startswith("bitsandbytes.")
