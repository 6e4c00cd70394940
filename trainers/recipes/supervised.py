"""Supervised flow matching on the in-context pair: t2i, edit, joint and sft are four settings of this recipe.
The target panel is noised, the condition panel stays clean, and only the left half of the prediction counts."""

from __future__ import annotations

import torch
from diffusers import DreamLiteUNetModel

from trainers.data import Batch, Plan, TrainingRows, drop_conditions
from trainers.flow import draw_times, interpolate, keyed_normal, keyed_uniform, predict
from trainers.loop import Ema, batch_gradient, cosine_rate, optimizer_step
from trainers.lora import trainable
from trainers.optimizer import make_optimizer
from trainers.settings import SupervisedSettings


class SupervisedRecipe:
    """One stage. `key` (seed, stage number) fixes every draw of it."""

    def __init__(
        self, unet: DreamLiteUNetModel, rows: TrainingRows, settings: SupervisedSettings, key: tuple[int, ...]
    ) -> None:
        self.unet, self.rows, self.settings, self.key = unet.train(), rows, settings, key
        self.plan = Plan(rows, settings.tasks, settings.batch, key)
        optimizer = make_optimizer(
            settings.optimizer, unet, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.modules, self.optimizers = {"unet": unet}, {"unet": optimizer}
        self.ema = Ema(unet, settings.ema_decay)

    def step(self, index: int) -> dict[str, float]:
        """One optimizer step on batch `index` of the plan."""
        settings = self.settings
        batch = drop_conditions(self.rows.batch(*self.plan.indices(index)), settings, self.key)
        times = dict(zip(batch.positions, draw_batch_times(batch, settings, self.key), strict=True))

        def loss(part: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            chosen = torch.stack([times[position] for position in part.positions])
            per_row = velocity_losses(self.unet, part, chosen, settings, self.key, self.rows.size_px)
            return per_row.mean(), {"per_row": per_row.detach()}

        parameters = trainable(self.unet)
        per_row = torch.cat([logs["per_row"] for logs in batch_gradient(parameters, batch, settings.micro_batch, loss)])
        rate = cosine_rate(
            index,
            steps=settings.steps,
            peak=settings.learning_rate,
            warmup=settings.warmup_steps,
            final_share=settings.final_learning_rate_share,
        )
        norm = optimizer_step(self.optimizers["unet"], parameters, settings.clip_norm, rate)
        self.ema.update(self.unet)
        metrics = {"loss": per_row.mean().item(), "gradient_norm": norm, "learning_rate": rate}
        for task, mask in (("generate", ~batch.is_edit), ("edit", batch.is_edit)):
            if mask.any():
                metrics[f"loss_{task}"] = per_row[mask].mean().item()
        return metrics


def draw_batch_times(batch: Batch, settings: SupervisedSettings, key: tuple[int, ...]) -> torch.Tensor:
    """One time a row [B], stratified over the batch, t_i = (i + u) / B before the law: unbiased, with less variance."""
    offset = keyed_uniform((*key, 3), batch.positions[:1], 1)[0, 0]
    count = len(batch.positions)
    strata = (torch.arange(count) + offset) / count
    order = torch.argsort(keyed_uniform((*key, 4), batch.positions, 1)[:, 0])  # no task owns a range of times
    return draw_times(strata[order], settings.timestep_law, settings.timestep_shift)


def velocity_losses(
    unet: DreamLiteUNetModel, batch: Batch, times: torch.Tensor, settings: SupervisedSettings, key: tuple[int, ...], size_px: int
) -> torch.Tensor:
    """Flow-matching loss of each row [B]: mean over the left panel of weight x (v - (noise - data))^2."""
    noise = keyed_normal((*key, 2), batch.positions, tuple(batch.latents.shape[1:]))
    velocity = predict(unet, interpolate(batch.latents, noise, times), times, batch.condition, batch.text, size_px)
    squared = (velocity - (noise - batch.latents)) ** 2
    if settings.foreground_weight:
        squared = squared * batch.weight.clamp(max=settings.foreground_weight_cap)
    return squared.mean(dim=(1, 2, 3))
