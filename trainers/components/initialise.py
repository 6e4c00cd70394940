"""Start weights of the small transformers: spread by the width of each layer.
transformers draws with a deviation of 0.02, which starves networks this narrow at the start."""

from __future__ import annotations

from torch import nn


def initialise_narrow(
    root: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv3d), leave: nn.Module | None = None
) -> None:
    """Draw the weight of every layer of `kinds` below `root` from a normal whose variance is one over its inputs; `leave` stays,
    as does a head that shares its weight with the embeddings."""
    for module in root.modules():
        if isinstance(module, kinds) and module is not leave:
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
