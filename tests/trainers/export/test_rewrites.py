"""Each rewrite alone keeps every number, reaches every layer it is for, and leaves the training model untouched."""

from __future__ import annotations

import pytest
import torch
from diffusers import DreamLiteUNetModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm
from torch import nn

from tests.trainers.conftest import TINY_MODEL
from trainers.export.prepare import UNetGraph
from trainers.export.rewrites import average_norms, fold_attention, split_gates
from trainers.model import build_unet

TEXT_WIDTH = 32


def unet(seed: int = 0) -> DreamLiteUNetModel:
    """All block types of the official network; fresh norms are all-ones, so theirs are drawn too."""
    model = build_unet(TINY_MODEL, TEXT_WIDTH, 8, seed).eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, nn.GroupNorm | nn.LayerNorm | RMSNorm):
                for value in layer.parameters():
                    value.data.uniform_(0.5, 1.5)
    return model


def velocity(model: DreamLiteUNetModel) -> torch.Tensor:
    noise = torch.Generator().manual_seed(1)
    mask = (torch.arange(12)[None] < torch.tensor([[12], [5], [1]])).long()
    with torch.no_grad():
        return model(
            torch.randn(3, 4, 8, 16, generator=noise),
            torch.tensor([1000.0, 640.25, 3.5]),
            torch.randn(3, 12, TEXT_WIDTH, generator=noise),
            encoder_attention_mask=mask,
            added_cond_kwargs={"time_ids": torch.full((3, 2), 64.0)},
            return_dict=False,
        )[0]


def kinds(model: nn.Module, *types: type) -> int:
    return sum(isinstance(layer, types) for layer in model.modules())


@pytest.mark.parametrize(
    ("rewrite", "gone"),
    [(fold_attention, ()), (average_norms, (nn.GroupNorm, nn.LayerNorm, RMSNorm)), (split_gates, (GEGLU,))],
)
def test_a_rewrite_is_exact_and_complete(rewrite, gone: tuple[type, ...]) -> None:
    """Negative control: the same layers with one value projection scaled by a hundredth are off by far more than the rewrite."""
    model, rewritten = unet(), unet()
    assert not gone or kinds(model, *gone) > 0
    rewrite(rewritten)
    assert kinds(rewritten, *gone) == 0 if gone else all("Folded" in type(p).__name__ for p in rewritten.attn_processors.values())
    stock, value = velocity(model), velocity(rewritten)
    assert (stock - value).abs().max() < 1e-5
    next(layer for layer in rewritten.modules() if isinstance(layer, Attention)).to_v.weight.data.mul_(1.01)
    assert (stock - velocity(rewritten)).abs().max() > 1e-5


@pytest.mark.parametrize("delegable", [False, True])
def test_all_rewrites_together_are_exact_and_work_on_a_copy(delegable: bool) -> None:
    model = unet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rewritten = UNetGraph(model, delegable=delegable)
    assert kinds(rewritten, nn.GroupNorm, nn.LayerNorm, RMSNorm, GEGLU) == (0 if delegable else kinds(model, nn.GroupNorm, nn.LayerNorm, RMSNorm, GEGLU))
    assert (velocity(model) - velocity(rewritten.unet)).abs().max() < 1e-5
    assert not any("Folded" in type(processor).__name__ for processor in model.attn_processors.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_more_key_value_heads_are_refused() -> None:
    config = {key: value for key, value in unet().config.items() if not key.startswith("_")}
    with pytest.raises(ValueError, match="num_kv_heads=1"):
        UNetGraph(DreamLiteUNetModel(**config | {"num_kv_heads": 2}))
