"""What a hacked reward does to pictures, as numbers to log beside it: light, colour, edges, sameness, and an edit beyond its place.
None of them is trained on; a curve that leaves where the start model was says more than the reward."""

from __future__ import annotations

import torch
from torch.nn import functional as F


@torch.no_grad()
def picture_measures(images01: torch.Tensor) -> dict[str, torch.Tensor]:
    """Means (no axes) over images [B, 3, H, W] in about [0, 1]: brightness, saturation ((max - min) / max of the channels), energy of the
    Laplacian (sharpening and noise raise it, blur lowers it) and, of two or more images, the distance between two of them."""
    images = images01.clamp(0, 1)
    highest, lowest = images.amax(1), images.amin(1)
    laplacian = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], device=images.device).view(1, 1, 3, 3)
    edges = F.conv2d(images.mean(1, keepdim=True), laplacian)
    measures = {
        "brightness": images.mean(),
        "saturation": ((highest - lowest) / highest.clamp(min=1e-3)).mean(),
        "edge_energy": (edges**2).mean(),
    }
    if len(images) > 1:
        measures["diversity"] = (torch.pdist(images.flatten(1)) / images[0].numel() ** 0.5).mean()
    return measures


@torch.no_grad()
def change_outside_edit(images01: torch.Tensor, sources01: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """Mean absolute difference of edited images to their sources where the foreground `weight` [B, 1, h, w] marks no edit. Rows of one
    weight are left out, for they have no mask or one that covers everything; None where no other row is there."""
    marked = (weight > 1).flatten(1).any(1).view(-1, 1, 1, 1)
    if not marked.any():
        return None
    kept = F.interpolate(((weight == 1) & marked).float(), images01.shape[-2:])
    change = (images01.clamp(0, 1) - sources01.clamp(0, 1)).abs().mean(1, keepdim=True)
    return (change * kept).sum() / kept.sum().clamp(min=1)
