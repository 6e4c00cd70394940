"""Exact rewrites of layers whose stock form compilers refuse, repeat or leave outside the accelerator.
Each takes a module's copy, replaces layers in place and keeps every number; each has its own parity test."""

from __future__ import annotations

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn


class FoldedAttention:
    """Attention processor with query heads folded into the query length.

    With one key/value head, (B, N, H*D) seen as (B, N*H, D) needs only 3-D products, no repeat of keys and values
    and no transposes: the same numbers as DreamLiteAttnProcessor2_0 in a graph that phone compilers accept.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states (B, N, C), encoder_hidden_states (B, M, C') or None, attention_mask an additive (B, 1, M)."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        length = hidden_states.shape[1]
        query = attn.to_q(hidden_states)
        inner = query.shape[-1]
        width = inner // attn.heads
        query = query.view(-1, length, attn.heads, width)
        key = attn.to_k(context).view(-1, context.shape[1], 1, width)
        value = attn.to_v(context)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        query = query.reshape(-1, length * attn.heads, width)
        scores = torch.bmm(query, key.squeeze(2).transpose(1, 2)) * width**-0.5
        if attention_mask is not None:
            scores = scores + attention_mask
        mixed = torch.bmm(scores.softmax(dim=-1), value).view(-1, length, inner)
        mixed = attn.to_out[0](mixed)
        if attn.residual_connection:
            mixed = mixed + hidden_states
        return mixed / attn.rescale_output_factor


def fold_attention(model: nn.Module) -> None:
    """Give every attention of `model` the folded processor; ValueError where keys have more than one head."""
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            # diffusers' Attention does not keep its number of key/value heads; the width of to_k tells it.
            width = module.to_q.out_features // module.heads
            if module.to_k.out_features != width:
                raise ValueError(
                    f"unet {name} has {module.to_k.out_features // width} key/value heads; "
                    "export folds multi-query attention and needs a UNet trained with num_kv_heads=1."
                )
            module.set_processor(FoldedAttention())


class AveragedRowNorm(nn.Module):
    """LayerNorm, or with `centred` off RMSNorm, over the last axis, its mean taken by a linear layer of constant weights.

    XNNPACK delegates linear layers and elementwise arithmetic but neither norm, so a stock norm cuts the graph in two.
    """

    def __init__(self, width: int, eps: float, weight: Tensor | None, bias: Tensor | None, *, centred: bool) -> None:
        super().__init__()
        self.eps, self.centred = eps, centred
        self.average = _averaging_linear(width)
        self.weight, self.bias = _frozen(weight), _frozen(bias)

    def forward(self, states: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if self.centred:
            states = states - self.average(states)
        states = states * torch.rsqrt(self.average(states * states) + self.eps)
        if self.weight is not None:
            states = states * self.weight
        return states if self.bias is None else states + self.bias


class AveragedGroupNorm(nn.Module):
    """GroupNorm of (B, C, H, W): the mean over pixels, then over a group's channels by a grouped 1x1 convolution."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        group = norm.num_channels // norm.num_groups
        self.average = nn.Conv2d(norm.num_channels, norm.num_channels, 1, groups=norm.num_groups, bias=False).requires_grad_(False)
        self.average.weight.fill_(1.0 / group)
        self.weight, self.bias = (_frozen(value if value is None else value.view(1, -1, 1, 1)) for value in (norm.weight, norm.bias))

    def forward(self, states: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        states = states - self._mean(states)
        states = states * torch.rsqrt(self._mean(states * states) + self.eps)
        if self.weight is not None:
            states = states * self.weight
        return states if self.bias is None else states + self.bias

    def _mean(self, states: Tensor) -> Tensor:
        return self.average(states.mean(dim=(2, 3), keepdim=True))


def average_norms(model: nn.Module) -> None:
    """Replace every LayerNorm, RMSNorm and GroupNorm of `model` by products with constant averaging weights.

    For delegates that know no norms (XNNPACK); ONNX Runtime and Core ML have kernels for the stock ones.
    """

    def averaged(layer: nn.Module) -> nn.Module | None:
        if isinstance(layer, nn.GroupNorm):
            return AveragedGroupNorm(layer)
        if isinstance(layer, nn.LayerNorm):
            return AveragedRowNorm(layer.normalized_shape[-1], layer.eps, layer.weight, layer.bias, centred=True)
        if isinstance(layer, RMSNorm):
            return AveragedRowNorm(layer.dim[-1], layer.eps, layer.weight, layer.bias, centred=False)
        return None

    _replace(model, averaged)


class SplitGEGLU(nn.Module):
    """GEGLU with the value and the gate projected by a linear layer each, where the stock layer projects both and cuts."""

    def __init__(self, layer: GEGLU) -> None:
        super().__init__()
        self.value, self.gate = (_linear(*part) for part in _halves(layer.proj))

    def forward(self, states: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        return self.value(states) * nn.functional.gelu(self.gate(states))


def split_gates(model: nn.Module) -> None:
    """Replace every GEGLU of `model`: delegates that know no split keep the whole feed-forward."""
    _replace(model, lambda layer: SplitGEGLU(layer) if isinstance(layer, GEGLU) else None)


def _replace(model: nn.Module, replacement) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            new = replacement(child)
            if new is not None:
                setattr(parent, name, new.eval())


def _frozen(value: Tensor | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value.detach().clone(), requires_grad=False)


def _averaging_linear(width: int) -> nn.Linear:
    layer = nn.Linear(width, 1, bias=False).requires_grad_(False)
    layer.weight.fill_(1.0 / width)
    return layer


def _halves(layer: nn.Linear) -> list[tuple[Tensor, Tensor | None]]:
    biases = (None, None) if layer.bias is None else layer.bias.chunk(2)
    return list(zip(layer.weight.chunk(2), biases, strict=True))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight, layer.bias = _frozen(weight), _frozen(bias)
    return layer
