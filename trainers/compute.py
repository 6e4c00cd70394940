"""What each training stage will take, before anyone spends a cent: work, memory of a GPU, GPU-hours and disk.
Counted from the settings and the meta-device network alone; throughput is a ceiling for a given share of the GPU's peak."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dreamlite_data.rewards.plan import GPUS, USABLE_MEMORY
from trainers.flow import deployed_sigmas, steps_within
from trainers.network_cost import NetworkCost, adapter_parameters, decoder_cost, forward_flops, unet_cost
from trainers.settings import DMD2Settings, LoraSettings, ReFLSettings, SupervisedSettings

StageSettings = SupervisedSettings | ReFLSettings | DMD2Settings

FLOAT32_BYTES = 4
ADAM_BYTES = 8
"""Mean and square of each parameter's gradient, float32."""
GRADIENT_COPIES = 2
"""The sum over micro-batches, and the gradient of the one that is being added."""
BACKWARD = 2
"""Work of a backward pass in forward passes; of one to the inputs alone, as below an adapter, half of it."""
LATENT_BYTES = 2
STATE_BYTES = 2

REWARDS = {"generate": (7.75e9, 12.3e12, 820), "edit": (7.75e9, 20.1e12, 1296)}
"""HPSv3 and EditReward as published, 7 B backbones without lm_head: parameters, FLOP of one forward pass (decoder at 13.05 GFLOP a
token, vision tower 1.6 TFLOP an image) and decoder tokens (EditReward's two prompts share their prefix)."""
REWARD_LAYERS, REWARD_HIDDEN, REWARD_KEYS, REWARD_INNER = 28, 3584, 512, 18944
"""Qwen2-VL-7B's decoder: what a frozen layer keeps for a gradient to its input follows from its widths."""
STORED_TOKENS = {"generate": 100, "edit": 2 * 400}
"""Prompt states cached for a row: of a caption of about 100 tokens; of an edit with and without its instruction, each with the 256
image tokens of a 512 px source."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """`count` GPUs of one kind. `utilisation` is the share of their peak that training reaches: 0.28 was measured for the UNet of
    Stable Diffusion 2 on A100 (github.com/mosaicml/diffusion); depthwise convolutions may reach half of it."""

    gpu: str = "H100 SXM"
    count: int = 8
    utilisation: float = 0.28

    @classmethod
    def of(cls, gpu: str, count: int, utilisation: float) -> Cluster:
        """Of a GPU by the beginning of its name in any case; raises ValueError where none or no sensible figure is meant."""
        named = [name for name in GPUS if name.lower().startswith(gpu.lower())]
        found = [name for name in named if name.lower() == gpu.lower()] or named
        if not found:
            raise ValueError(f"no data sheet of a GPU '{gpu}': give one of {', '.join(GPUS)}")
        if count < 1 or not 0 < utilisation <= 1:
            raise ValueError(f"{count} GPUs at {utilisation:g} of their peak cannot be: give at least 1 GPU and a share above 0, up to 1")
        return cls(found[0], count, utilisation)

    @property
    def flops_per_s(self) -> float:
        """What all of them do in a second."""
        return GPUS[self.gpu][0] * 1e12 * self.utilisation * self.count

    @property
    def memory_bytes(self) -> float:
        """Of one GPU, without what CUDA and fragments take."""
        return GPUS[self.gpu][1] * 1e9 * USABLE_MEMORY


@dataclasses.dataclass(frozen=True)
class Network:
    """What the plan knows of the model: diffusers config of the UNet, side of a panel, pixels of a latent, decoder widths and blocks."""

    config: Mapping[str, Any]
    size_px: int
    latent_px: int = 8
    decoder_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)

    def unet(self, size_px: int | None = None, precision: str = "bfloat16") -> NetworkCost:
        """Of one sample at a size, by default the model's own."""
        return unet_cost(self.config, (size_px or self.size_px) // self.latent_px, getattr(torch, precision))

    def trained_parameters(self, lora: LoraSettings | None) -> int:
        """Parameters that one trained copy of the UNet has of its own: all, or those of its adapter."""
        return self.unet().parameters if lora is None else adapter_parameters(self.config, lora)

    def decoder(self, precision: str = "bfloat16") -> NetworkCost:
        """Of one image at the model's size."""
        return decoder_cost(self.decoder_channels, self.decoder_blocks, self.size_px // self.latent_px, getattr(torch, precision))


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps of a stage at one size."""

    steps: int
    size_px: int
    micro_batch: int


def phases(settings: StageSettings, size_px: int) -> list[Phase]:
    """The sizes that a stage trains at, in their order."""
    sizes = settings.size_phases if isinstance(settings, SupervisedSettings) else ()
    found = [Phase(phase.steps, phase.size_px, phase.micro_batch or settings.micro_batch) for phase in sizes]
    return found or [Phase(settings.steps, size_px, settings.micro_batch)]


def flops_per_sample(settings: StageSettings, config: Mapping[str, Any], size_px: int, latent_px: int) -> Callable[[int], float]:
    """Work of the UNets for one sample at a given step, without recomputation: what a rate or a share of a peak counts."""
    stages = phases(settings, size_px)
    ends = list(itertools.accumulate(phase.steps for phase in stages))
    sides = [phase.size_px // latent_px for phase in stages]
    flops = [forwards_per_sample(settings, side) * forward_flops(config, side) for side in sides]
    return lambda index: flops[min(bisect.bisect_right(ends, index), len(flops) - 1)]


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bfloat16 FLOP/s of a GPU; None for CPUs and for GPUs whose data sheet is not in the table."""
    if device.type != "cuda":
        return None
    seen = torch.cuda.get_device_name(device).lower()
    if "pcie" in seen:
        return None  # the table's figures are of the SXM boards
    return next((tflops * 1e12 for name, (tflops, _) in GPUS.items() if name.split(" ")[0].lower() in seen.split()), None)


# -- work


def forwards_per_sample(settings: StageSettings, side: int) -> float:
    """Work of the UNets for one sample of a global batch, in forward passes of one UNet; recomputation is not counted.

    supervised: forward and backward, 3. ReFL: a guided rollout to the drawn step, 3 for that step, 1 for the frozen start model.
    DMD2: the student's own steps and 3 with gradient, guided teacher and fake score; and `fake_steps` times its own steps,
    a clean estimate and 3 for the fake. Each 3 is 2 with an adapter, for frozen weights need no gradient. Half of the rows are
    edits, which have one guidance branch more.
    """
    with_gradient = 1 + (BACKWARD if settings.lora is None else BACKWARD / 2)
    if isinstance(settings, SupervisedSettings):
        return with_gradient
    if isinstance(settings, ReFLSettings):
        exits = steps_within(deployed_sigmas(settings.rollout_steps, side, side), settings.sigma_low, settings.sigma_high)
        rollout = sum(exits) / max(1, len(exits)) * _branches(settings)
        return rollout + with_gradient + 1
    own_steps = (settings.student_steps - 1) / 2
    student = own_steps + with_gradient + _branches(settings) + 1
    return student + settings.fake_steps * (own_steps + 1 + with_gradient)


def _branches(settings: ReFLSettings | DMD2Settings) -> float:
    """Network calls of one guided velocity, over generate and edit rows in equal parts."""
    generate = 1 if settings.guidance_scale == settings.image_guidance_scale == 1.0 else 2
    edit = generate if settings.image_guidance_scale == 1.0 else 3
    return (generate + edit) / 2


def work_rows(stages: Mapping[str, StageSettings], network: Network, cluster: Cluster) -> list[dict[str, Any]]:
    """A row per stage: passes and TFLOP a sample, exaFLOP of the stage, and what the cluster makes of it at its utilisation."""
    rows = []
    for name, settings in stages.items():
        passes = forwards_per_sample(settings, network.size_px // network.latent_px)
        samples = settings.steps * settings.batch
        flops = settings.batch * sum(
            phase.steps * passes * network.unet(phase.size_px).forward_flops for phase in phases(settings, network.size_px)
        )
        if isinstance(settings, ReFLSettings):  # forward, and backward to the image
            rewards = sum(reward for _, reward, _ in REWARDS.values()) / len(REWARDS)
            flops += samples * (2 * rewards + 3 * network.decoder().forward_flops)
        seconds = flops / cluster.flops_per_s
        rows.append({
            "stage": name, "steps": settings.steps, "batch": settings.batch, "samples": samples, "unet_passes": passes,
            "tflop_per_sample": flops / samples / 1e12, "exaflop": flops / 1e18, "samples_per_s": samples / seconds,
            "gpu_hours": seconds * cluster.count / 3600, "hours": seconds / 3600,
        })  # fmt: skip
    total = {name: sum(row[name] for row in rows) for name in ("samples", "exaflop", "gpu_hours", "hours")}
    return [*rows, dict.fromkeys(rows[0], None) | {"stage": "all"} | total]


# -- memory


def memory_rows(stages: Mapping[str, StageSettings], network: Network, cluster: Cluster, shard_rewards: bool = False) -> list[dict[str, Any]]:
    """A row per stage, gigabytes of one GPU: trained networks in float32, frozen ones, and activations of one
    micro-batch without and with gradient checkpointing. `fits` says with which of them the GPU holds it, or how small the
    micro-batch must be."""
    return [_memory_row(name, settings, network, cluster, shard_rewards) for name, settings in stages.items()]


def _memory_row(name: str, settings: StageSettings, network: Network, cluster: Cluster, shard_rewards: bool) -> dict[str, Any]:
    # The phase whose micro-batch keeps most decides; activations are of the precision that the stage computes in.
    phase = max(
        phases(settings, network.size_px), key=lambda each: each.micro_batch * network.unet(each.size_px, settings.precision).activation_bytes
    )
    unet = network.unet(phase.size_px, settings.precision)
    weights = unet.parameters * FLOAT32_BYTES
    own = network.trained_parameters(settings.lora) * FLOAT32_BYTES
    trained = 2 if isinstance(settings, DMD2Settings) else 1  # the student and the fake score
    # Adapters, and the teacher or start model that has none, stand on one copy of the frozen weights.
    frozen = weights if settings.lora is not None or not isinstance(settings, SupervisedSettings) else 0
    reward, plain, checkpointed = 0.0, unet.activation_bytes, unet.checkpointed_bytes
    if isinstance(settings, ReFLSettings):
        reward = sum(parameters for parameters, _, _ in REWARDS.values()) * 2 / (cluster.count if shard_rewards else 1)
        # One task a step. The reward's graph lives while the UNet's waits.
        decoded, longest = network.decoder(settings.precision).activation_bytes, max(tokens for _, _, tokens in REWARDS.values())
        plain += decoded + reward_activation_bytes(longest)
        checkpointed += decoded + reward_activation_bytes(longest, checkpointed=True)
    parts = {
        "weights": trained * own, "gradients": GRADIENT_COPIES * own, "optimizer": trained * own * ADAM_BYTES / FLOAT32_BYTES,
        "ema": own, "frozen": frozen, "rewards": reward,
    }  # fmt: skip
    held, rows = sum(parts.values()), phase.micro_batch
    fits = "no: not one sample"
    if held + rows * plain <= cluster.memory_bytes:
        fits = "yes"
    elif held + rows * checkpointed <= cluster.memory_bytes:
        fits = "with checkpointing"
    elif held + checkpointed <= cluster.memory_bytes:
        fits = f"micro_batch {int((cluster.memory_bytes - held) // checkpointed)}, checkpointing"
    return {
        "stage": name, **{f"{part}_gb": size / 1e9 for part, size in parts.items()}, "micro_batch": rows,
        "activations_gb": rows * plain / 1e9, "checkpointed_gb": rows * checkpointed / 1e9,
        "total_gb": (held + rows * plain) / 1e9, "total_checkpointed_gb": (held + rows * checkpointed) / 1e9, "fits": fits,
    }  # fmt: skip


def reward_activation_bytes(tokens: int, *, checkpointed: bool = False) -> int:
    """What a frozen 7 B decoder keeps in bfloat16 for the gradient of one score to its image: inputs of norms, of attention's
    products and of the gate; or layer inputs and one layer, recomputed."""
    layer = 4 * REWARD_HIDDEN + 2 * REWARD_KEYS + 3 * REWARD_INNER
    widths = REWARD_LAYERS * REWARD_HIDDEN + layer if checkpointed else REWARD_LAYERS * layer
    return tokens * widths * 2


# -- disk


def disk_rows(stages: Mapping[str, StageSettings], network: Network, rows: Mapping[str, int], components: Path | None) -> list[dict[str, Any]]:
    """Gigabytes on disk: cached latents and prompt states of `rows` of each task, and state and checkpoint of each stage."""
    latent, width = 4 * (network.size_px // network.latent_px) ** 2 * LATENT_BYTES, int(network.config["encoder_hid_dim"])
    found = [
        {"what": f"latents of {rows['generate']:,} images", "gb": rows["generate"] * latent / 1e9},
        {"what": f"latents of {rows['edit']:,} edits, source and target", "gb": 2 * rows["edit"] * latent / 1e9},
        *({"what": f"prompt states, {task}", "gb": rows[task] * STORED_TOKENS[task] * width * STATE_BYTES / 1e9} for task in rows),
    ]
    frozen = sum(path.stat().st_size for path in components.rglob("*") if path.is_file()) if components and components.is_dir() else 0
    parameters = network.unet().parameters
    for name, settings in stages.items():
        trained = 2 if isinstance(settings, DMD2Settings) else 1
        state = network.trained_parameters(settings.lora) * (trained * (FLOAT32_BYTES + ADAM_BYTES) + FLOAT32_BYTES)
        found.append({"what": f"{name}: resume state (twice while it is replaced)", "gb": 2 * state / 1e9})
        found.append({"what": f"{name}: checkpoint", "gb": (parameters * FLOAT32_BYTES + frozen) / 1e9})
    return [*found, {"what": "all", "gb": sum(row["gb"] for row in found)}]
