"""Gradients of scores to images, chunk by chunk, for every scorer alike.
Each score depends on its own image alone, so its gradient is taken at once and kept as an image: one chunk's graph lives at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MuOf = Callable[[Tensor, Sequence[str], Tensor | None], Tensor]
"""mu [B] of a chunk: images [B, 3, H, W] in [0, 1], their prompts, and the images before the edit or None."""


def chunked(mu_of: MuOf, images01: Tensor, prompts: Sequence[str], sources01: Tensor | None, chunk_size: int) -> Tensor:
    """`mu_of` of all images, [B], with gradient to `images01` only."""
    return _Chunked.apply(images01, mu_of, list(prompts), sources01, chunk_size)


class _Chunked(torch.autograd.Function):
    """Forward: mu and, where images need gradient, d mu / d image. Backward: one multiplication."""

    @staticmethod
    def forward(ctx, images01, mu_of, prompts, sources01, chunk_size):  # noqa: ANN001, ANN205
        scores, gradients = [], []
        for start in range(0, images01.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            chunk = images01[rows].detach().requires_grad_(ctx.needs_input_grad[0])
            sources = None if sources01 is None else sources01[rows].detach()
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                mu = mu_of(chunk, prompts[rows], sources)
                if ctx.needs_input_grad[0]:
                    gradients.append(torch.autograd.grad(mu.sum(), chunk)[0])
            scores.append(mu.detach().to(images01.device))
        ctx.save_for_backward(torch.cat(gradients) if gradients else torch.empty(0))
        return torch.cat(scores)

    @staticmethod
    def backward(ctx, grad_mu):  # noqa: ANN001, ANN205
        (gradients,) = ctx.saved_tensors
        return grad_mu.to(gradients.dtype).view(-1, 1, 1, 1) * gradients, None, None, None, None
