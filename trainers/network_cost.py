"""What one pass of a network costs, counted on the meta device: floating point operations and the activations its gradient keeps.
Nothing is computed and no weight exists, so that a laptop can plan for a cluster."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderTiny, DreamLiteUNetModel
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from trainers.lora import add_lora, trainable
from trainers.settings import LoraSettings

PLANNED_TOKENS = 100
"""Prompt states that a sample is planned with: the length that the published figures of the network's cost were counted at."""


@dataclasses.dataclass(frozen=True)
class NetworkCost:
    """Of one sample: `forward_flops` (2 for each multiply-add), and bytes that a forward pass with gradient keeps for the
    backward pass: all of it, or block inputs and one block anew with gradient checkpointing. Attention is counted as the plain
    product of matrices, which fused kernels do not keep: an upper bound."""

    parameters: int
    forward_flops: float
    activation_bytes: int
    checkpointed_bytes: int


def unet_cost(config: Mapping[str, Any], side: int, dtype: torch.dtype = torch.bfloat16) -> NetworkCost:
    """Of the UNet with this diffusers config on a pair of panels of side x side latents, activations in `dtype`."""
    return _unet_cost(_key(config), side, dtype)


@functools.lru_cache
def _unet_cost(config: str, side: int, dtype: torch.dtype) -> NetworkCost:
    with torch.device("meta"):
        network, inputs = _unet(json.loads(config), side, dtype)
        with FlopCounterMode(display=False) as counter, kept_for_backward(network) as kept:
            network(**inputs)
        with kept_for_backward(network) as between_blocks:
            largest = _checkpoint_blocks(network, between_blocks)
            network(**inputs)
    return NetworkCost(
        sum(parameter.numel() for parameter in network.parameters()),
        float(counter.get_total_flops()),
        kept.bytes,
        between_blocks.bytes + max(largest, default=0),
    )


def adapter_parameters(config: Mapping[str, Any], settings: LoraSettings) -> int:
    """Parameters of a LoRA adapter on the UNet with this config; raises ValueError where the settings name no layer of it."""
    return _adapter_parameters(_key(config), settings)


@functools.lru_cache
def _adapter_parameters(config: str, settings: LoraSettings) -> int:
    with torch.device("meta"):
        network, _ = _unet(json.loads(config), 1, torch.float32)
        add_lora(network, settings, seed=0)
    return sum(parameter.numel() for parameter in trainable(network))


def forward_flops(config: Mapping[str, Any], side: int) -> float:
    """Floating point operations of one forward pass of that UNet for one sample, counted once in a process."""
    return _forward_flops(_key(config), side)


@functools.lru_cache
def _forward_flops(config: str, side: int) -> float:
    with torch.device("meta"), torch.no_grad():
        network, inputs = _unet(json.loads(config), side, torch.float32)
        with FlopCounterMode(display=False) as counter:
            network(**inputs)
    return float(counter.get_total_flops())


def _key(config: Mapping[str, Any]) -> str:
    # What a loaded network adds to its configuration (where it came from, as a Path) says nothing of its cost.
    return json.dumps({name: value for name, value in config.items() if not name.startswith("_")}, sort_keys=True)


def _unet(config: Mapping[str, Any], side: int, dtype: torch.dtype) -> tuple[DreamLiteUNetModel, dict[str, Any]]:
    network = DreamLiteUNetModel.from_config(dict(config))
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    width = network.config.encoder_hid_dim
    return network.train(), {
        "sample": torch.empty(1, 4, side, 2 * side, dtype=dtype),
        "timestep": torch.empty(1, dtype=dtype),
        "encoder_hidden_states": torch.empty(1, PLANNED_TOKENS, width, dtype=dtype),
        "encoder_attention_mask": torch.ones(1, PLANNED_TOKENS, dtype=dtype),
        "added_cond_kwargs": {"time_ids": torch.empty(1, 2, dtype=dtype)},
    }


@functools.lru_cache
def decoder_cost(channels: tuple[int, ...], blocks: tuple[int, ...], side: int, dtype: torch.dtype = torch.bfloat16) -> NetworkCost:
    """Of a VAE decoder (`decoder_block_out_channels`, `num_decoder_blocks`) from side x side latents, with gradient to them."""
    with torch.device("meta"):
        decoder = AutoencoderTiny(decoder_block_out_channels=channels, num_decoder_blocks=blocks).decoder.to(dtype).requires_grad_(False)
        latents = torch.empty(1, 4, side, side, dtype=dtype, requires_grad=True)
        with FlopCounterMode(display=False) as counter, kept_for_backward(decoder) as kept:
            decoder(latents)
    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    return NetworkCost(parameters, float(counter.get_total_flops()), kept.bytes, kept.bytes)


class Kept:
    """Storages that a graph holds on to, each counted once; those of a network's own parameters are not counted."""

    def __init__(self, network: nn.Module) -> None:
        self._own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        self._held: dict[int, torch.UntypedStorage] = {}  # keeping them alive keeps their addresses apart

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count the storage behind `tensor`."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._held[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._held.values())


@contextmanager
def kept_for_backward(network: nn.Module) -> Iterator[Kept]:
    """Count what the passes of `network` within the block keep for their backward pass."""
    kept = Kept(network)
    with saved_tensors_hooks(kept.add, lambda tensor: tensor):
        yield kept


def _checkpoint_blocks(network: nn.Module, kept: Kept) -> list[int]:
    """Let the blocks that gradient checkpointing recomputes keep their inputs alone, as it would. Returns the list to which
    each pass adds what the blocks then hold while they are computed anew."""
    largest: list[int] = []

    def recomputed(block: Callable[..., Any], *inputs: Any) -> Any:
        for value in inputs:
            for tensor in value.values() if isinstance(value, Mapping) else [value]:
                if isinstance(tensor, torch.Tensor):
                    kept.add(tensor)
        with kept_for_backward(network) as inside:
            output = block(*inputs)
        largest.append(inside.bytes)
        return output

    network.enable_gradient_checkpointing(recomputed)
    return largest
