"""The noise levels a bundle deploys, computed from the checkpoint's scheduler configuration without torch.
Kept apart so that `verify_bundle` can recompute them where only the bundle is installed."""

from __future__ import annotations

import math
from typing import Any


def deployed_sigmas(scheduler: dict[str, Any], sequence_length: int, steps: int) -> list[float]:
    """Sigmas of FlowMatchEulerDiscreteScheduler with dynamic shifting, as DreamLiteMobilePipeline asks for them.

    mu lies on the line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift) at
    `sequence_length` = latent cells of ONE panel / 4 (pipeline_dreamlite_mobile.calculate_shift, diffusers 0.42.1);
    sigma = e^mu / (e^mu + 1/t - 1) for t = 1 .. 1/steps; then 0.
    """
    base, top = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.16)
    slope = (high - low) / (top - base)
    shift = math.exp(sequence_length * slope + low - slope * base)
    times = [1.0 + (1.0 / steps - 1.0) * index / max(steps - 1, 1) for index in range(steps)]
    return [shift / (shift + 1.0 / time - 1.0) for time in times] + [0.0]
