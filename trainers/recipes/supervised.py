"""Supervised flow matching on the in-context pair: t2i, edit, joint and sft are four settings of this recipe.
The target panel is noised, the condition panel stays clean, and only the left half of the prediction counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DreamLiteUNetModel

from trainers.batch_plan import Plan
from trainers.data import Batch, TrainingRows, drop_conditions
from trainers.flow import draw_times, interpolate, keyed_normal, keyed_uniform, min_snr_weight, predict
from trainers.loop import Ema, batch_gradient, cosine_rate, optimizer_step
from trainers.lora import trainable
from trainers.optimizer import make_optimizer
from trainers.settings import SupervisedSettings

SIGMA_BINS = 4
"""Parts of [0, 1] whose mean loss is logged: the loss of all times hides which of them improve."""


class SupervisedRecipe:
    """One stage. `key` (seed, stage number) fixes every draw of it; `rows` are one set, or one for each of `size_phases`."""

    def __init__(
        self,
        unet: DreamLiteUNetModel,
        rows: TrainingRows | Sequence[TrainingRows],
        settings: SupervisedSettings,
        key: tuple[int, ...],
    ) -> None:
        self.unet, self.settings, self.key = unet.train(), settings, key
        self.rows = list(rows) if isinstance(rows, Sequence) else [rows]
        self.plans = [Plan(each.pools(), settings.tasks, settings.batch, key) for each in self.rows]
        optimizer = make_optimizer(
            settings.optimizer, unet, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.modules, self.optimizers = {"unet": unet}, {"unet": optimizer}
        self.ema = Ema(unet, settings.ema_decay, settings.ema_width)

    def step(self, index: int) -> dict[str, float]:
        """One optimizer step on batch `index` of the plan of its phase."""
        settings = self.settings
        phase, micro_batch = self._phase(index)
        batch = drop_conditions(self.rows[phase].batch(*self.plans[phase].indices(index)), settings, self.key)
        drawn = draw_batch_times(batch, settings, self.key)
        times = dict(zip(batch.positions, drawn, strict=True))

        def loss(part: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            chosen = torch.stack([times[position] for position in part.positions]).to(part.device)
            per_row = velocity_losses(self.unet, part, chosen, settings, self.key)
            return per_row.mean(), {"per_row": per_row}

        parameters = trainable(self.unet)
        per_row = torch.cat([logs["per_row"] for logs in batch_gradient(parameters, batch, micro_batch, loss)])
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
        return metrics | sigma_losses(per_row, drawn)

    def _phase(self, index: int) -> tuple[int, int]:
        """(number of the phase that step `index` lies in, its micro-batch)."""
        end = 0
        for number, phase in enumerate(self.settings.size_phases):
            end += phase.steps
            if index < end:
                return number, phase.micro_batch or self.settings.micro_batch
        return 0, self.settings.micro_batch


def sigma_losses(per_row: torch.Tensor, times: torch.Tensor) -> dict[str, float]:
    """Mean loss of the rows whose time lies in each of SIGMA_BINS equal parts of [0, 1], where there are any."""
    bins = (times * SIGMA_BINS).long().clamp(max=SIGMA_BINS - 1)
    return {
        f"loss_sigma_{number / SIGMA_BINS:g}_to_{(number + 1) / SIGMA_BINS:g}": per_row[bins == number].mean().item()
        for number in bins.unique().tolist()
    }


def draw_batch_times(batch: Batch, settings: SupervisedSettings, key: tuple[int, ...]) -> torch.Tensor:
    """One time a row [B], stratified over the batch, t_i = (i + u) / B before the law: unbiased, with less variance."""
    if not settings.stratified_times:
        return draw_times(keyed_uniform((*key, 3), batch.positions, 1)[:, 0], settings.timestep_law, settings.timestep_shift)
    offset = keyed_uniform((*key, 3), batch.positions[:1], 1)[0, 0]
    count = len(batch.positions)
    strata = (torch.arange(count) + offset) / count
    order = torch.argsort(keyed_uniform((*key, 4), batch.positions, 1)[:, 0])  # no task owns a range of times
    return draw_times(strata[order], settings.timestep_law, settings.timestep_shift)


def velocity_losses(
    unet: DreamLiteUNetModel, batch: Batch, times: torch.Tensor, settings: SupervisedSettings, key: tuple[int, ...]
) -> torch.Tensor:
    """Flow-matching loss of each row [B]: mean over the left panel of weight x (v - (noise - data))^2."""
    noise = keyed_normal((*key, 2), batch.positions, tuple(batch.latents.shape[1:]), batch.device)
    x = interpolate(batch.latents, noise, times)
    velocity = predict(unet, x, times, batch.condition, batch.text, batch.size_px, settings.precision)
    squared = (velocity - (noise - batch.latents)) ** 2
    if settings.foreground_weight:
        squared = squared * batch.weight.clamp(max=settings.foreground_weight_cap)
    losses = squared.mean(dim=(1, 2, 3))
    return losses if settings.min_snr_gamma is None else losses * min_snr_weight(times, settings.min_snr_gamma)
