"""Supervised flow matching on the in-context pair: t2i, edit, joint and sft are four settings of this recipe.
The target panel is noised, the condition panel stays clean, and only the left half of the prediction counts."""

from __future__ import annotations

import torch
from diffusers import DreamLiteUNetModel

from trainers.data import Batch, Plan, TrainingRows, drop_conditions
from trainers.flow import draw_times, interpolate, keyed_normal, keyed_uniform, predict
from trainers.loop import Ema, cosine_rate, optimizer_step
from trainers.settings import SupervisedSettings


class SupervisedRecipe:
    """One stage. `key` (seed, stage number) fixes every draw of it."""

    def __init__(
        self, unet: DreamLiteUNetModel, rows: TrainingRows, settings: SupervisedSettings, key: tuple[int, ...]
    ) -> None:
        self.unet, self.rows, self.settings, self.key = unet.train(), rows, settings, key
        self.plan = Plan(rows, settings.tasks, settings.batch, key)
        optimizer = torch.optim.AdamW(
            unet.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98)
        )
        self.modules, self.optimizers = {"unet": unet}, {"unet": optimizer}
        self.ema = Ema(unet, settings.ema_decay)

    def step(self, index: int) -> dict[str, float]:
        """One optimizer step on batch `index` of the plan."""
        settings = self.settings
        batch = drop_conditions(self.rows.batch(*self.plan.indices(index)), settings, self.key)
        per_row = velocity_losses(self.unet, batch, settings, self.key, self.rows.size_px)
        rate = cosine_rate(
            index,
            steps=settings.steps,
            peak=settings.learning_rate,
            warmup=settings.warmup_steps,
            final_share=settings.final_learning_rate_share,
        )
        loss = per_row.mean()
        norm = optimizer_step(self.optimizers["unet"], self.unet.parameters(), loss, settings.clip_norm, rate)
        self.ema.update(self.unet)
        metrics = {"loss": loss.item(), "gradient_norm": norm, "learning_rate": rate}
        for task, mask in (("generate", ~batch.is_edit), ("edit", batch.is_edit)):
            if mask.any():
                metrics[f"loss_{task}"] = per_row.detach()[mask].mean().item()
        return metrics


def velocity_losses(
    unet: DreamLiteUNetModel, batch: Batch, settings: SupervisedSettings, key: tuple[int, ...], size_px: int
) -> torch.Tensor:
    """Flow-matching loss of each row [B]: mean over the left panel of weight x (v - (noise - data))^2.

    Times are stratified over the batch, t_i = (i + u) / B before the law: unbiased, with less variance.
    """
    noise = keyed_normal((*key, 2), batch.positions, tuple(batch.latents.shape[1:]))
    offset = keyed_uniform((*key, 3), batch.positions[:1], 1)[0, 0]
    count = len(batch.positions)
    strata = (torch.arange(count) + offset) / count
    order = torch.argsort(keyed_uniform((*key, 4), batch.positions, 1)[:, 0])  # no task owns a range of times
    times = draw_times(strata[order], settings.timestep_law, settings.timestep_shift)
    velocity = predict(unet, interpolate(batch.latents, noise, times), times, batch.condition, batch.text, size_px)
    squared = (velocity - (noise - batch.latents)) ** 2
    if settings.foreground_weight:
        squared = squared * batch.weight.clamp(max=settings.foreground_weight_cap)
    return squared.mean(dim=(1, 2, 3))
