"""The adversarial head of DMD2: is a noised panel data or the student's? It reads the middle features of the fake score.
Both panels pass the network, but only the left half of the features is read: the right one shows the source, which is always real."""

from __future__ import annotations

import threading

import torch
from diffusers import DreamLiteUNetModel
from torch import nn

from trainers.data import Batch
from trainers.flow import predict
from trainers.settings import Precision

SMALLEST_SIDE = 4
"""Features are halved to this size before they are pooled (DMD2, main/sd_guidance.py of tianweiy/DMD2)."""


class Discriminator(nn.Module):
    """Logits [B], above 0 for data, from middle features [B, C, h, w] of one panel.

    As in DMD2's code, strided 4 x 4 convolutions with group norm and SiLU; the mean over what is left, in place of a last
    convolution of fixed size, lets panels of any shape in.
    """

    def __init__(self, unet: DreamLiteUNetModel, side: int, seed: int) -> None:
        super().__init__()
        channels, groups = unet.config.block_out_channels[-1], unet.config.norm_num_groups
        side //= 2 ** (len(unet.config.block_out_channels) - 1)
        with torch.random.fork_rng(devices=()):  # drawn on the CPU; every GPU would be forked too
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            while side > SMALLEST_SIDE:
                layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), nn.GroupNorm(groups, channels), nn.SiLU()]
                side //= 2
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(groups, channels), nn.SiLU()]
            self.body, self.head = nn.Sequential(*layers), nn.Linear(channels, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(features).mean((2, 3)))[:, 0]


class _MiddleReached(Exception):
    """Ends a forward pass whose later blocks nobody reads."""


def middle_features(unet: DreamLiteUNetModel, x: torch.Tensor, t: torch.Tensor, batch: Batch, precision: Precision) -> torch.Tensor:
    """Output of the middle block [B, C, h, w] for the left panel, float32, with its graph; the blocks after it are not run."""
    captured: list[torch.Tensor] = []
    caller = threading.get_ident()

    def capture(_module: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
        if threading.get_ident() == caller:  # other threads may run the same network now
            captured.append(output)
            raise _MiddleReached

    handle = unet.mid_block.register_forward_hook(capture)
    try:
        predict(unet, x, t, batch.condition, batch.text, batch.size_px, precision)
    except _MiddleReached:
        pass
    finally:
        handle.remove()
    return captured[0][..., : captured[0].shape[3] // 2].float()
