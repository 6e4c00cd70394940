"""Train a stage: from folders and dataset versions to one folder that holds its checkpoint.
How a checkpoint is judged and drawn from stands elsewhere, so that a change there trains nothing anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dreamlite_data.dataset import find_version
from dreamlite_data.lake import Lake
from dreamlite_data.rewards import RewardModel, load_reward, load_scorer
from trainers.compute import flops_per_sample, peak_flops
from trainers.conditioning import PromptEncoder, encoder_grid_px
from trainers.data import TrainingRows, encoders_digest, parts_digest
from trainers.device import CPU
from trainers.distributed import first_process_first, wait_for_all, world
from trainers.execution import TrainExecution
from trainers.loop import run
from trainers.lora import add_lora, merge_lora, save_lora
from trainers.model import build_unet, latent_scale, load_facts, load_unet, load_vae, save_checkpoint
from trainers.recipes.dmd2 import DMD2Recipe
from trainers.recipes.refl import ReFLRecipe
from trainers.recipes.supervised import SupervisedRecipe
from trainers.reward_sharding import shard_reward
from trainers.settings import DMD2Settings, ModelSettings, ReFLSettings, SupervisedSettings

STAGES = ("t2i", "edit", "joint", "sft", "refl", "dmd2")
StageSettings = SupervisedSettings | ReFLSettings | DMD2Settings
Versions = dict[str, int | None]


class StoppedError(RuntimeError):
    """A recipe that watches itself took no further step."""


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
    the parent was trained with another hidden-state setting, a dataset lacks columns, or refl or dmd2 has no parent, and StoppedError
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
    rewards: dict[str, RewardModel] = {}
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
        made_of={
            "model": model.model_dump(mode="json"),
            "rows": {name: find_version(lake, name, datasets[name])[1] for name in settings.datasets},
            "components": digest,
            "rewards": {task: reward.scorer_id for task, reward in rewards.items()},
            "parent": parent and parts_digest(parent, "unet"),
        },
    )
    if "stopped_at_step" in metrics:
        raise StoppedError(
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
