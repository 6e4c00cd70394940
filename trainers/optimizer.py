"""Muon for matrices and convolution kernels, AdamW for everything else, in one optimizer with one learning rate.
`torch.optim.Muon` takes neither kernels nor float32 arithmetic, and bfloat16 products are slow on processors without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from trainers.lora import trainable
from trainers.parallel import map_threads
from trainers.settings import OptimizerName

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Quintic coefficients of K. Jordan's Muon (kellerjordan.github.io/posts/muon), also torch's defaults."""
NEWTON_SCHULZ_STEPS = 5
SMALLEST_SIDE = 8
"""A kernel with fewer input or output channels (first and last layers, depthwise) has no matrix worth orthogonalising."""
UPDATE_SPREAD = 0.2
"""Root mean square of a matrix update in units of the learning rate: that of AdamW, so that one rate fits both kinds
(Moonlight, arXiv 2502.16982, section 2.2)."""


def make_optimizer(name: OptimizerName, module: nn.Module, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer that a recipe's settings name, for one network."""
    betas = (0.9, 0.98)
    if name == "muon":
        return Muon(module, learning_rate=learning_rate, weight_decay=weight_decay, betas=betas)
    return torch.optim.AdamW(trainable(module), lr=learning_rate, weight_decay=weight_decay, betas=betas)


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that Muon takes: weights of two or more axes whose first two have 8 or more entries, embeddings left out."""
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    return [
        parameter
        for parameter in trainable(module)
        if parameter.ndim >= 2 and min(parameter.shape[:2]) >= SMALLEST_SIDE and id(parameter) not in embeddings
    ]


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz for `hidden_matrices`, AdamW for the other parameters of `modules`.

    Weight decay is decoupled and touches the matrices alone.
    """

    def __init__(
        self,
        *modules: nn.Module,
        learning_rate: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        matrices = {id(parameter): parameter for module in modules for parameter in hidden_matrices(module)}
        everything = {id(parameter): parameter for module in modules for parameter in trainable(module)}
        others = [parameter for key, parameter in everything.items() if key not in matrices]
        groups = [{"params": list(matrices.values()), "matrices": True}, {"params": others, "matrices": False}]
        defaults = {"lr": learning_rate, "momentum": momentum, "betas": betas, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            if parameters := [parameter for parameter in group["params"] if parameter.grad is not None]:
                (self._step_matrices if group["matrices"] else self._step_others)(parameters, group)
        return loss

    def _step_matrices(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters]
        momenta = [self.state[parameter].setdefault("momentum", torch.zeros_like(parameter)) for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        places: dict[tuple[int, int], list[int]] = {}
        for index, parameter in enumerate(parameters):
            places.setdefault((len(parameter), parameter[0].numel()), []).append(index)
        # Matrices of one shape in one product, for most are too small to fill a call; the largest products first.
        shapes = sorted(places, key=lambda shape: (-len(places[shape]) * shape[0] * shape[1] * min(shape), shape))
        stacks = [torch.stack([directions[index].reshape(shape) for index in places[shape]]) for shape in shapes]
        for shape, updates in zip(shapes, map_threads(orthogonalised, stacks), strict=True):
            chosen = [parameters[index] for index in places[shape]]
            updates = [update.reshape(parameter.shape) for parameter, update in zip(chosen, updates, strict=True)]
            torch._foreach_add_(chosen, updates, alpha=-group["lr"] * UPDATE_SPREAD * max(shape) ** 0.5)

    def _step_others(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("mean", "square")}
                self.state[parameter].update(zeros, steps=torch.zeros((), device=parameter.device))
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["mean"] for state in states],
            [state["square"] for state in states],
            [],
            [state["steps"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )


def orthogonalised(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values of [..., M, N] go to about 0.7 .. 1.2, vectors stay."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
