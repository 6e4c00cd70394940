"""Flow matching in one place: the path, its conversions, time laws, guidance and the batched Euler sampler.
Convention of the released model: t = sigma = 1 is pure noise and the network predicts v = noise - data."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DreamLiteUNetModel, FlowMatchEulerDiscreteScheduler

from trainers.conditioning import Embeddings
from trainers.settings import Precision

# Constants of the released scheduler (dynamic shift: base 0.5 at 256 tokens, 1.15 at 4096).
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
TRAIN_TIMESTEPS = 1000.0
Velocity = Callable[[torch.Tensor, float], torch.Tensor]


def interpolate(data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) data + t noise; `t` [B] broadcasts over [B, C, H, W]."""
    t = t.view(-1, *[1] * (data.ndim - 1))
    return (1 - t) * data + t * noise


def data_from_velocity(x: torch.Tensor, velocity: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x0 = x_t - t v."""
    return x - t.view(-1, *[1] * (x.ndim - 1)) * velocity


def noise_from_velocity(x: torch.Tensor, velocity: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """eps = x_t + (1 - t) v."""
    return x + (1 - t.view(-1, *[1] * (x.ndim - 1))) * velocity


def draw_times(uniform: torch.Tensor, law: str, shift: float) -> torch.Tensor:
    """Turn uniform draws [B] into times: `uniform`, or `logit_normal` (mean 0, scale 1; SD3, arXiv 2403.03206),
    then the static shift t' = a t / (1 + (a - 1) t)."""
    if law == "logit_normal":
        t = torch.sigmoid(math.sqrt(2.0) * torch.erfinv((2 * uniform - 1).clamp(-1 + 1e-6, 1 - 1e-6)))
    elif law == "uniform":
        t = uniform
    else:
        raise ValueError(f"timestep_law {law!r} is unknown: choose uniform or logit_normal")
    return shifted(t, shift)


def shifted(t: torch.Tensor, shift: float) -> torch.Tensor:
    """The static shift t' = a t / (1 + (a - 1) t) (SD3, arXiv 2403.03206, section 5.3.2); above 1 it favours noise."""
    return shift * t / (1 + (shift - 1) * t)


def min_snr_weight(t: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weight of a velocity loss that makes the data loss count min(SNR, gamma) times (arXiv 2303.09556): the data error is t
    times the velocity error and SNR = ((1 - t) / t)^2, so t^2 min(SNR, gamma) = min((1 - t)^2, gamma t^2)."""
    return torch.minimum((1 - t) ** 2, gamma * t**2)


def dynamic_shift(height: int, width: int, config: dict[str, Any]) -> float:
    """mu of the exponential shift: linear in the tokens of ONE panel, height x width latents in 2x2 patches."""
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    return height * width // 4 * slope + config["base_shift"] - slope * low


def deployed_sigmas(steps: int, height: int, width: int, config: dict[str, Any] | None = None) -> list[float]:
    """The sigmas that the deployed scheduler takes for a panel of height x width latents, ending in 0."""
    config = SCHEDULER_CONFIG | (config or {})
    return list(_deployed_sigmas(steps, height, width, tuple((name, config[name]) for name in SCHEDULER_CONFIG)))


@functools.cache  # recipes ask in every step, for the panels of its batch
def _deployed_sigmas(steps: int, height: int, width: int, items: tuple[tuple[str, Any], ...]) -> tuple[float, ...]:
    config = dict(items)
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=dynamic_shift(height, width, config))
    return tuple(float(sigma) for sigma in scheduler.sigmas)


def steps_within(sigmas: Sequence[float], low: float, high: float) -> list[int]:
    """Indices of the sampling steps that begin at a sigma in [low, high]; the last entry of `sigmas` ends the last step."""
    return [index for index, sigma in enumerate(sigmas[:-1]) if low <= sigma <= high]


def predict(
    unet: DreamLiteUNetModel,
    x: torch.Tensor,
    t: torch.Tensor,
    condition: torch.Tensor,
    text: Embeddings,
    size_px: int | torch.Tensor,
    precision: Precision = "float32",
) -> torch.Tensor:
    """Velocity [B, C, H, W], float32, of the left panel. `condition` is the right panel (zeros to generate, source latents to
    edit), `t` [B] in [0, 1]; `time_ids` carry (width, height) of one panel: `size_px` is them [B, 2], or the side of a square.
    `precision` is that of the network's arithmetic; weights, x and t are float32 in either."""
    time_ids = torch.full((len(x), 2), float(size_px), device=x.device) if isinstance(size_px, int) else size_px
    with computing_in(precision, x.device.type):
        output = unet(
            torch.cat([x, condition], dim=3),
            timestep=t * TRAIN_TIMESTEPS,
            encoder_hidden_states=text.states,
            encoder_attention_mask=text.mask,
            added_cond_kwargs={"time_ids": time_ids},
            return_dict=False,
        )[0]
    return output[..., : x.shape[3]].float()


def computing_in(precision: Precision, device_type: str) -> torch.autocast:
    """Autocast for one call of a network. No weight is used twice in a call, so keeping its casts would only take memory."""
    return torch.autocast(device_type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)


def guide_generate(null: torch.Tensor, full: torch.Tensor, scale: float) -> torch.Tensor:
    """v = v_null + s (v_full - v_null); s = 1 is the conditional branch."""
    return null + scale * (full - null)


def guide_edit(
    null: torch.Tensor, image: torch.Tensor, full: torch.Tensor, scale: float, image_scale: float
) -> torch.Tensor:
    """v = v_null + s_text (v_full - v_image) + s_image (v_image - v_null); both 1 is the conditional branch.

    The three branches are (no text, zero panel), (no text, source panel), (text, source panel).
    """
    return null + scale * (full - image) + image_scale * (image - null)


def guided_velocity(
    unet: DreamLiteUNetModel,
    condition: torch.Tensor,
    text: Embeddings,
    null: Embeddings,
    is_edit: torch.Tensor,
    size_px: int | torch.Tensor,
    scale: float,
    image_scale: float,
    precision: Precision = "float32",
) -> Velocity:
    """The deployed guidance for a batch that may mix both tasks: a function (x, sigma) -> guided v.

    Branches that a scale switches off are not computed (scale 1 needs one pass, not three).
    """
    zeros = torch.zeros_like(condition)
    edit = is_edit.view(-1, 1, 1, 1)
    two = image_scale == 1.0 or not bool(is_edit.any())  # read once: a GPU waits for each reading

    def velocity(x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        t = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
        full = predict(unet, x, t, condition, text, size_px, precision)
        if scale == 1.0 and image_scale == 1.0:
            return full
        image = predict(unet, x, t, condition, null, size_px, precision)
        if two:
            # With image scale 1 the edit formula is v_image + s (v_full - v_image): the same as for generate.
            return guide_generate(image, full, scale)
        blank = predict(unet, x, t, zeros, null, size_px, precision)
        guided = guide_edit(blank, image, full, scale, image_scale)
        return torch.where(edit, guided, guide_generate(image, full, scale))

    return velocity


def sample(velocity: Velocity, noise: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """Euler from `noise` [B, C, H, W] down `sigmas` (descending, ending in 0)."""
    x = noise
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (following - sigma) * velocity(x, sigma)
    return x


def keyed_normal(
    key: tuple[int, ...], rows: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Standard normal [len(rows), *shape] where row i depends only on (key, rows[i]): any batch layout, any worker
    count, any resume and any device draw the same numbers."""
    # Drawn on the CPU and then moved: a GPU's generator has other numbers, and a plan must mean the same everywhere.
    return torch.from_numpy(np.stack([_philox(key, row).standard_normal(shape, dtype=np.float32) for row in rows])).to(device)


def keyed_uniform(key: tuple[int, ...], rows: Sequence[int], count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Uniform [len(rows), count] in [0, 1), keyed like `keyed_normal`."""
    return torch.from_numpy(np.stack([_philox(key, row).random(count, dtype=np.float32) for row in rows])).to(device)


def _philox(key: tuple[int, ...], row: int) -> np.random.Generator:
    words = [hash(tuple(int(part) for part in key)) & (2**64 - 1), int(row) & (2**64 - 1)]
    return np.random.Generator(np.random.Philox(key=words))
