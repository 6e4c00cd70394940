"""Worlds where the answer is known in closed form: points drawn from Gaussian mixtures in place of latents.
A panel of side x side points with C coordinates has the shape of latents, so recipes and samplers run on it unchanged."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from trainers.conditioning import Embeddings
from trainers.data import Batch, Row
from trainers.flow import keyed_normal, keyed_uniform

SIDE = 8
"""Points along each side of a panel: 64 a row, which share the row's time."""


class PointNet(nn.Module):
    """The call of a UNet around a small network that sees each point of the left panel with its time alone."""

    def __init__(self, coordinates: int, width: int = 64) -> None:
        super().__init__()
        layers = [nn.Linear(coordinates + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, coordinates)]
        self.body = nn.Sequential(*layers)

    def velocity(self, points: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Velocity of points [..., C] at times [..., 1]."""
        return self.body(torch.cat([points, t], dim=-1))

    def forward(self, sample, timestep, encoder_hidden_states, encoder_attention_mask, added_cond_kwargs, return_dict):
        left = sample[..., : sample.shape[3] // 2].permute(0, 2, 3, 1)
        t = (timestep / 1000).view(-1, 1, 1, 1).expand(*left.shape[:3], 1)
        velocity = self.velocity(left, t).permute(0, 3, 1, 2)
        return (torch.cat([velocity, torch.zeros_like(velocity)], dim=3),)


class ExactNet(PointNet):
    """The exact velocity for data from an equal mixture of N(mean_k, deviation^2): E[noise - data | x_t]."""

    def __init__(self, means: torch.Tensor, deviation: float) -> None:
        nn.Module.__init__(self)
        self.means, self.deviation = means, deviation

    def velocity(self, points: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        variance = (1 - t) ** 2 * self.deviation**2 + t**2
        away = points.unsqueeze(-2) - (1 - t).unsqueeze(-2) * self.means
        share = torch.softmax(-(away**2).sum(-1) / (2 * variance), dim=-1).unsqueeze(-1)
        gain = ((1 - t) * self.deviation**2 / variance).unsqueeze(-2)
        data = (share * (self.means + gain * away)).sum(-2)
        return (points - data) / t


class PointRows:
    """Rows whose targets are points of the mixture, drawn by row and position; an edit row's source is zero."""

    size_px, side = 8 * SIDE, SIDE

    def __init__(self, means: torch.Tensor, deviation: float, rows: int = 64) -> None:
        self.means, self.deviation = means, deviation
        self.rows = [Row(f"r{index}", ("generate", "edit")[index % 2], f"i{index}", None, "x", None, None) for index in range(rows)]
        self.by_task = {task: [index for index, row in enumerate(self.rows) if row.task == task] for task in ("generate", "edit")}

    def pools(self) -> dict[tuple[int, int], dict[str, list[int]]]:
        return {(self.size_px, self.size_px): self.by_task}

    def draw(self, positions: list[int]) -> torch.Tensor:
        """Points [N, C, side, side]."""
        shape = (self.means.shape[1], SIDE, SIDE)
        chosen = (keyed_uniform((91,), positions, SIDE * SIDE) * len(self.means)).long().view(-1, SIDE, SIDE)
        return self.means[chosen].permute(0, 3, 1, 2) + self.deviation * keyed_normal((92,), positions, shape)

    def batch(self, indices, positions, *, with_target: bool = True) -> Batch:
        count = len(indices)
        zeros = torch.zeros(count, self.means.shape[1], SIDE, SIDE)
        text = Embeddings(torch.zeros(count, 1, 1), torch.ones(count, 1, dtype=torch.long))
        rows = [self.rows[index] for index in indices]
        return Batch(
            self.draw(list(positions)) if with_target else zeros,
            zeros,
            text,
            text,
            torch.tensor([row.task == "edit" for row in rows]),
            torch.ones(count, 1, SIDE, SIDE),
            torch.full((count, 2), float(self.size_px)),
            rows,
            list(positions),
        )


def fitted(rows: PointRows, steps: int, seed: int = 0) -> PointNet:
    """A network that has learned the rows' velocity by plain regression, without any code of the recipes."""
    torch.manual_seed(seed)
    net = PointNet(rows.means.shape[1])
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(steps):
        data = rows.means[torch.randint(len(rows.means), (1024,))] + rows.deviation * torch.randn(1024, rows.means.shape[1])
        noise, t = torch.randn_like(data), torch.rand(1024, 1)
        loss = ((net.velocity((1 - t) * data + t * noise, t) - (noise - data)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def points(panels: torch.Tensor) -> torch.Tensor:
    """Panels [N, C, side, side] as points [M, C]."""
    return panels.permute(0, 2, 3, 1).reshape(-1, panels.shape[1])


def sliced_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Sliced 2-Wasserstein distance of two equally large sets of points in the plane, over 64 directions."""
    angles = torch.arange(64) * torch.pi / 64
    directions = torch.stack([angles.cos(), angles.sin()])
    gap = (first @ directions).sort(0).values - (second @ directions).sort(0).values
    return float((gap**2).mean().sqrt())


def coverage(drawn: torch.Tensor, means: torch.Tensor, deviation: float) -> tuple[float, torch.Tensor]:
    """(share of points within 3 deviations of a mean, share of all points nearest to each mean)."""
    distance, nearest = torch.cdist(drawn, means).min(1)
    counts = torch.bincount(nearest, minlength=len(means)) / len(drawn)
    return float((distance < 3 * deviation).float().mean()), counts


IDENTITY_VAE = SimpleNamespace(decoder=lambda latents: latents)
"""Images are the points themselves."""
