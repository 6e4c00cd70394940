"""Train the small world's VAE: an `AutoencoderTiny` of the released layout (f8, 4 latent channels).
Noise on the latents during training makes the decoder forgive the small errors of a diffusion model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch.nn import functional as F

from dreamlite_data import scenes

LATENT_NOISE = 0.25  # standard deviation of the largest noise, in units of the latents' own spread (about 1)


def build_vae(
    *, steps: int, batch: int = 16, channels: int = 16, seed: int = 0, log: Callable[[int, dict[str, float]], None]
) -> tuple[AutoencoderTiny, dict[str, float]]:
    """Train on freshly drawn scenes; returns the model and its metrics on held-out ones.

    `scenes_read` is the share of held-out scenes that the verifier still reads exactly after a round trip,
    `scenes_read_noisy` the same with noise of standard deviation 0.15 on the latents.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 1))
    model = AutoencoderTiny(
        encoder_block_out_channels=(channels,) * 4,
        decoder_block_out_channels=(channels,) * 4,
        num_encoder_blocks=(1, 2, 3, 3),
        num_decoder_blocks=(3, 3, 2, 1),
        latent_channels=4,
        scaling_factor=1.0,
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.2e-3, weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.2e-3, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        images = to_tensor(np.stack([scenes.render(scenes.sample_scene(rng)) for _ in range(batch)]))
        latents = model.encoder(images)
        level = LATENT_NOISE * torch.rand((batch, 1, 1, 1), generator=generator)
        noisy = latents + level * torch.randn(latents.shape, generator=generator)
        decoded = model.decoder(noisy)
        loss_pixel = F.l1_loss(decoded, images) + F.mse_loss(decoded, images)
        loss_edge = sum(
            F.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis)) for axis in (2, 3)
        )
        # Unit spread and zero mean per channel: the scale that flow matching's unit noise expects.
        spread = latents.var(dim=(0, 2, 3))
        loss_latent = (spread.log() ** 2).mean() + (latents.mean(dim=(0, 2, 3)) ** 2).mean()
        loss = loss_pixel + loss_edge + 0.02 * loss_latent
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            log(step + 1, {"loss": loss.item(), "pixel": loss_pixel.item(), "spread": spread.mean().item()})
    return model, measure_vae(model, seed=seed + 1_000)


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


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """float [N, 3, H, W] in [-1, 1] to uint8 [N, H, W, 3]."""
    return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
