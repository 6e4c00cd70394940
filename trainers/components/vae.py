"""Train the small world's VAE: an `AutoencoderTiny` of the released layout (f8, 4 latent channels).
Noise on the latents during training makes the decoder forgive the small errors of a diffusion model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import nn
from torch.nn import functional as F

from dreamlite_data import scenes
from dreamlite_data.scenes.render import background
from trainers.pixels import to_tensor, to_uint8

OBJECT_WEIGHT = 8.0
ENCODER_SHARE = 0.15  # first share of the steps, in which only the encoder learns, against the linear decoder
CYCLES = ((1.0, 0.2, 5e-3), (0.625, 0.1, 5e-3), (0.625, 0.08, 3e-3), (0.4, 0.08, 3e-3))
"""(share of the steps, latent noise, peak rate) of each training cycle; the noise is in units of the latents' spread."""


def build_vae(
    *, steps: int, batch: int = 16, channels: int = 16, seed: int = 0, start: AutoencoderTiny | None = None,
    latent_noise: float = 0.2, peak_rate: float = 5e-3, log: Callable[[int, dict[str, float]], None]
) -> tuple[AutoencoderTiny, dict[str, float]]:
    """Train on freshly drawn scenes; returns the model and its metrics on held-out ones.

    `scenes_read` is the share of held-out scenes that the verifier still reads exactly after a round trip,
    `scenes_read_noisy` the same with noise of standard deviation 0.15 on the latents.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 1))
    model = start or AutoencoderTiny(
        encoder_block_out_channels=(channels,) * 4,
        decoder_block_out_channels=(channels,) * 4,
        num_encoder_blocks=(1, 2, 3, 3),
        num_decoder_blocks=(3, 3, 2, 1),
        latent_channels=4,
        scaling_factor=1.0,
    ).to(memory_format=torch.channels_last)
    if start is None:
        initialise(model)
    # A throw-away linear decoder: its short path teaches the encoder colours long before the deep decoder can.
    linear_decoder = nn.Sequential(nn.Conv2d(4, 48, 3, padding=1), nn.PixelShuffle(4))
    parameters = [*model.parameters(), *linear_decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak_rate, weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=steps, pct_start=0.02)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        drawn = [scenes.sample_scene(rng) for _ in range(batch)]
        pixels = np.stack([scenes.render(scene) for scene in drawn])
        images = to_tensor(pixels).contiguous(memory_format=torch.channels_last)
        weight = object_weight(pixels, drawn)
        latents = model.encoder(images)
        loss_pixel = loss_edge = torch.zeros(())
        if start is not None or step >= steps * ENCODER_SHARE:
            level = latent_noise * min(1.0, 2 * step / steps) * torch.rand((batch, 1, 1, 1), generator=generator)
            error = model.decoder(latents + level * torch.randn(latents.shape, generator=generator)) - images
            loss_pixel = (weight * (error.abs() + 2 * error**2)).mean()
            loss_edge = sum((weight.narrow(axis, 0, 63) * error.diff(dim=axis).abs()).mean() for axis in (2, 3))
        # White latents: zero mean, unit spread, no channel a copy of another. It is the scale that flow matching's
        # unit noise expects, and it keeps the code from collapsing to brightness.
        flat = latents.transpose(0, 1).flatten(1)
        loss_latent = ((torch.cov(flat) - torch.eye(len(flat))) ** 2).mean() + (flat.mean(1) ** 2).mean()
        small, small_weight = F.avg_pool2d(images, 2), F.avg_pool2d(weight, 2)
        loss_linear = (small_weight * (linear_decoder(latents) - small) ** 2).mean()
        loss = loss_pixel + loss_edge + 0.1 * loss_latent + loss_linear
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            log(step + 1, {"loss": loss.item(), "pixel": loss_pixel.item(), "linear": loss_linear.item(), "latent": loss_latent.item()})
    return model, measure_vae(model, seed=seed + 1_000)


def initialise(model: AutoencoderTiny) -> None:
    """He initialisation with quiet residual branches: the default one dims colours at each of some thirty layers."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith("conv.4.weight"):  # last convolution of an AutoencoderTinyBlock
            parameter.data.mul_(0.1)


def object_weight(pixels: np.ndarray, drawn: list[scenes.Scene]) -> torch.Tensor:
    """Weight [N, 1, H, W]: objects and their surroundings count `OBJECT_WEIGHT` times.

    They cover a tenth of an image; unweighted, the codec learns backgrounds and forgets what stands on them.
    """
    empty = np.stack([background(scene.background, scene.style) for scene in drawn])
    changed = torch.from_numpy(np.abs(pixels - empty).max(-1) > 4).float().unsqueeze(1)
    return 1 + (OBJECT_WEIGHT - 1) * F.max_pool2d(changed, 5, stride=1, padding=2)


@torch.no_grad()
def measure_vae(model: AutoencoderTiny, *, seed: int, count: int = 512) -> dict[str, float]:
    """Round trips of `count` held-out scenes: exact readings, mean absolute error in 0..255, latent mean and spread."""
    rng = np.random.default_rng((seed, 2))
    generator = torch.Generator().manual_seed(seed)
    truth = [scenes.sample_scene(rng) for _ in range(count)]
    images = np.stack([scenes.render(scene) for scene in truth])
    latents = torch.cat([model.encoder(to_tensor(part)) for part in np.array_split(images, count // 64 or 1)])
    metrics = {"latent_mean": latents.mean().item(), "latent_std": latents.std().item()}
    for name, level in (("", 0.0), ("_noisy", 0.15)):
        noisy = latents + level * torch.randn(latents.shape, generator=generator)
        decoded = to_uint8(torch.cat([model.decoder(part) for part in noisy.split(64)]))
        right = sum(scenes.matches(image, scene) for image, scene in zip(decoded, truth, strict=True))
        metrics[f"scenes_read{name}"] = right / count
        metrics[f"mean_absolute_error{name}"] = float(np.abs(decoded.astype(int) - images).mean())
    return metrics
