"""What the flows call: build the parts, train a stage, judge a checkpoint, draw from it.
Each function reads folders and dataset versions and writes one folder; nothing here knows Prefect or Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dreamlite_data.lake import Lake
from dreamlite_data.rewards import load_reward, load_scorer
from trainers.components.build import build_components
from trainers.compute import flops_per_sample, peak_flops
from trainers.conditioning import PromptEncoder, encoder_grid_px
from trainers.data import TrainingRows
from trainers.device import CPU
from trainers.distributed import first_process_first, wait_for_all, world
from trainers.evaluate import evaluate_images, velocity_loss
from trainers.execution import TrainExecution
from trainers.inference import Sampler
from trainers.loop import run
from trainers.lora import add_lora, merge_lora, save_lora
from trainers.model import build_unet, latent_scale, load_facts, load_unet, load_vae, save_checkpoint
from trainers.recipes.dmd2 import DMD2Recipe
from trainers.recipes.refl import ReFLRecipe
from trainers.recipes.supervised import SupervisedRecipe
from trainers.reward_sharding import shard_reward
from trainers.settings import (
    DMD2Settings,
    EvaluateSettings,
    ModelSettings,
    ReFLSettings,
    SupervisedSettings,
)

__all__ = [
    "STAGES",
    "build_components",
    "edit_images",
    "encoders_digest",
    "evaluate_checkpoint",
    "follow_checkpoint",
    "generate_images",
    "train_stage",
]

STAGES = ("t2i", "edit", "joint", "sft", "refl", "dmd2")
StageSettings = SupervisedSettings | ReFLSettings | DMD2Settings
Versions = dict[str, int | None]


def train_stage(
    stage: str,
    settings: StageSettings,
    model: ModelSettings,
    *,
    components: Path,
    parent: Path | None,
    lake: Lake,
    datasets: Versions,
    output: Path,
    seed: int,
    execution: TrainExecution | None = None,
    device: torch.device = CPU,
    on_checkpoint: Callable[[int, Mapping[str, float]], None] | None = None,
) -> dict[str, float]:
    """Train one stage into output/checkpoint, resuming from output/ where an earlier try was killed.
    Of a stage that trains an adapter, output/adapter holds it, and the checkpoint the network with it merged in.

    Where several processes have been joined (`trainers.launch`), each calls this with its own `device`; the first one writes.

    `datasets` maps each name that the settings list to its version. Returns the last metrics. Raises ValueError where
    the parent was trained with another hidden-state setting, a dataset lacks columns, or refl or dmd2 has no parent, and RuntimeError
    where the recipe stopped itself: nothing may be distilled from a hacked reward.
    """
    if parent is None and not isinstance(settings, SupervisedSettings):
        raise ValueError(f"stage {stage!r} starts from a checkpoint: train a stage before it or name one in start.checkpoint")
    inherited = {} if parent is None else load_facts(parent)
    if parent is not None:
        model = follow_checkpoint(parent, model)
    phases = settings.size_phases if isinstance(settings, SupervisedSettings) else ()
    if phases and phases[-1].size_px != model.size_px:
        raise ValueError(f"train.{stage}.size_phases ends at {phases[-1].size_px} px, but {parent or 'the model'} is of {model.size_px} px: end with that size")
    encoder = PromptEncoder.load(components, model.hidden_state).to(device)
    vae = load_vae(components).to(device)
    if parent is None:
        unet = build_unet(model, encoder.text_encoder.config.text_config.hidden_size, model.size_px // latent_scale(vae.config), seed)
    else:
        unet = load_unet(parent)
    if settings.lora is not None:
        add_lora(unet, settings.lora, seed)
    unet.to(device)

    digest = encoders_digest(components)

    def rows_of(size_px: int, logical_size_px: int | None = None) -> TrainingRows:
        return TrainingRows(
            lake,
            [(name, datasets[name]) for name in settings.datasets],
            split="train",
            vae=vae,
            encoder=encoder,
            components_digest=digest,
            size_px=size_px,
            encode_images=settings.reads_targets,
            columns=settings.columns,
            aspect_buckets=model.aspect_buckets,
            logical_size_px=logical_size_px,
        )

    key = (seed, STAGES.index(stage))
    with first_process_first():  # it fills the caches of latents and prompt states, the others read them
        rows = [rows_of(phase.size_px, phase.logical_size_px) for phase in phases] or rows_of(model.size_px)
    encoder.to(CPU)  # the caches are full: the networks of the recipe need its room
    execution, peak = execution or TrainExecution(), peak_flops(device)
    if execution.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if isinstance(settings, SupervisedSettings):
        recipe = SupervisedRecipe(unet, rows, settings, key)
    elif isinstance(settings, ReFLSettings):
        narrow = getattr(torch, settings.precision)  # as `compute` counts them: two 7 B backbones in float32 fill an 80 GB GPU
        rewards = {task: load_reward(components / "rewards" / task, device, narrow) for task in ("generate", "edit")}
        seconds = {task: load_scorer(second.kind, second.model, device) for task, second in settings.second_scorers.items()}
        for reward in rewards.values():
            if execution.gradient_checkpointing:
                reward.enable_activation_checkpointing()
            if execution.shard_rewards:
                shard_reward(reward, settings.batch)
        recipe = ReFLRecipe(unet, vae, rewards, rows, settings, key, seconds)
    else:
        recipe = DMD2Recipe(unet, rows, settings, key)
    metrics = run(
        recipe,
        steps=settings.steps,
        output=output,
        label=stage,
        checkpoint_every_s=execution.checkpoint_every_s,
        flops_per_sample=flops_per_sample(settings, unet.config, model.size_px, latent_scale(vae.config)),
        peak_flops=peak and peak * world().size,
        on_checkpoint=on_checkpoint,
    )
    if "stopped_at_step" in metrics:
        raise RuntimeError(
            f"stage {stage!r} was stopped after {metrics['stopped_at_step']:.0f} of {settings.steps} steps, and no checkpoint is made of it: "
            f"{recipe.stop_reason()}"
        )
    if not world().first:
        wait_for_all()
        return metrics
    recipe.ema.copy_to(unet)
    unet.to(CPU)
    if settings.lora is not None:
        save_lora(unet, output / "adapter", inherited.get("weights"))
        merge_lora(unet)
    distilled = isinstance(settings, DMD2Settings)
    facts = {
        "stage": stage,
        "hidden_state": model.hidden_state,
        "size_px": model.size_px,
        "encoder_image_px": encoder_grid_px(encoder.processor.image_processor),
        "distilled_steps": settings.student_steps if distilled else None,
        "drop_generate": encoder.drop["generate"],
        "drop_edit": encoder.drop["edit"],
    }
    if "weights" in inherited:  # where the first of them came from, and under which licence
        facts["weights"] = inherited["weights"]
    save_checkpoint(unet, components, output / "checkpoint", facts=facts, distilled=distilled)
    wait_for_all()
    return metrics


def evaluate_checkpoint(
    stage: str,
    checkpoint: Path,
    settings: EvaluateSettings,
    *,
    components: Path,
    lake: Lake,
    datasets: Versions,
    output: Path,
    teacher: Path | None = None,
    device: torch.device = CPU,
) -> list[dict[str, object]]:
    """Rows (task, metric, value, n) of a checkpoint; pictures and scores.json go to `output`.

    `teacher` is the checkpoint that a distilled one is measured against, in the same number of steps.

    A distilled checkpoint has no velocity loss: its network is no longer the velocity of a path.
    """
    sampler = Sampler.load(checkpoint, device)
    rewards = {task: load_reward(components / "rewards" / task, device) for task in ("generate", "edit")}
    results = evaluate_images(sampler, rewards, settings, output, Sampler.load(teacher, device) if teacher else None)
    if sampler.distilled_steps is None:
        rows = TrainingRows(
            lake,
            [(name, datasets[name]) for name in ("t2i", "edit")],
            split=settings.split or "heldout",
            vae=sampler.vae,
            encoder=sampler.encoder,
            components_digest=encoders_digest(components),
            size_px=sampler.size_px,
            limit=settings.velocity_rows,
        )
        results += velocity_loss(sampler, rows, settings)
    return results


def generate_images(
    checkpoint: Path,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 10,
    guidance_scale: float = 2.0,
    device: torch.device = CPU,
) -> list[Image.Image]:
    """Draw one image a prompt."""
    drawn = Sampler.load(checkpoint, device).generate(
        prompts, range(seed, seed + len(prompts)), steps=steps, guidance_scale=guidance_scale
    )
    return [Image.fromarray(image) for image in drawn]


def edit_images(
    checkpoint: Path,
    images: Sequence[Image.Image],
    instructions: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 10,
    guidance_scale: float = 2.0,
    image_guidance_scale: float = 1.0,
    device: torch.device = CPU,
) -> list[Image.Image]:
    """Edit each image by its instruction."""
    edited = Sampler.load(checkpoint, device).edit(
        images,
        instructions,
        range(seed, seed + len(images)),
        steps=steps,
        guidance_scale=guidance_scale,
        image_guidance_scale=image_guidance_scale,
    )
    return [Image.fromarray(image) for image in np.asarray(edited)]


def follow_checkpoint(checkpoint: Path, model: ModelSettings) -> ModelSettings:
    """The settings with the hidden states and the size of the checkpoint, where they do not name them themselves.

    Raises ValueError where they name others: on other hidden states it would train on without any other sign.
    """
    found: dict[str, Any] = load_facts(checkpoint)
    for name in ("hidden_state", "size_px"):
        if name in model.model_fields_set and found[name] != getattr(model, name):
            raise ValueError(
                f"{checkpoint} was trained with {name} = {found[name]}, but model.{name} is {getattr(model, name)}:"
                " use the checkpoint's value"
            )
    return model.model_copy(update={name: found[name] for name in ("hidden_state", "size_px")})


def encoders_digest(folder: Path) -> str:
    """sha256 over the parts that make latents and prompt states: their cached outputs are keyed by it."""
    digest = hashlib.sha256()
    for part in ("vae", "text_encoder", "tokenizer", "processor"):
        for path in sorted((folder / part).rglob("*")):
            if path.is_file():
                digest.update(str(path.relative_to(folder)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
