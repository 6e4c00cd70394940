"""Distribution matching distillation (DMD2, arXiv 2405.14867) in flow form: a guided teacher, a few-step student.
The student is trained on its own deployed Euler rollouts; a second network learns the student's score."""

from __future__ import annotations

import sys

import torch
from diffusers import DreamLiteUNetModel
from torch.nn import functional as F

from trainers.batch_plan import Plan
from trainers.data import Batch, TrainingRows
from trainers.flow import (
    data_from_velocity,
    deployed_sigmas,
    interpolate,
    keyed_normal,
    keyed_uniform,
    predict,
    sample,
    shifted,
)
from trainers.loop import Ema, batch_gradient, cosine_rate, mean_logs, optimizer_step
from trainers.lora import frozen_copy, has_adapter, trainable, trainable_copy
from trainers.recipes.discriminator import Discriminator, middle_features
from trainers.settings import DMD2Settings

NORMALISER_FLOOR = 1e-6
HEALTHY_STD = (0.5, 2.0)
"""Spread of the student's latents in units of the teacher's: outside, the fake score lags or has diverged."""
ALARM_STEPS = 3


class DMD2Recipe:
    """Student and fake score start as copies of the teacher; one step is `fake_steps` of the fake, one of the student."""

    def __init__(
        self, teacher: DreamLiteUNetModel, rows: TrainingRows, settings: DMD2Settings, key: tuple[int, ...]
    ) -> None:
        self.student, self.fake = trainable_copy(teacher), trainable_copy(teacher)
        self.teacher = frozen_copy(teacher) if has_adapter(teacher) else teacher.eval().requires_grad_(False)
        self.rows, self.settings, self.key = rows, settings, key
        self.plan = Plan(rows.pools(), {"generate": 0.5, "edit": 0.5}, settings.batch, key)
        self.modules = {"student": self.student, "fake": self.fake}
        self.scored_by = trainable(self.fake)
        self.device = self.scored_by[0].device
        if settings.gan_weight:
            self.discriminator = Discriminator(teacher, rows.side, seed=key[0]).train().to(self.device)
            self.modules["discriminator"] = self.discriminator
            self.scored_by += self.discriminator.parameters()
        self.optimizers = {
            "student": torch.optim.AdamW(trainable(self.student), weight_decay=0.0, betas=(0.0, 0.99)),
            "fake": torch.optim.AdamW(self.scored_by, weight_decay=0.0, betas=(0.0, 0.99)),
        }
        self.ema = Ema(self.student, settings.ema_decay, settings.ema_width)
        self.teacher_std, self.alarmed = self._teacher_std(), 0

    def step(self, index: int) -> dict[str, float]:
        """Fake-score steps first, so that the student's gradient comes from a fake that knows it."""
        settings = self.settings
        warmup = settings.fake_warmup_steps if index == 0 else 0
        fakes = [self._fake_step(index, number) for number in range(settings.fake_steps + warmup)]
        batch = self._batch(index, 0)

        def loss(part: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            data = self._student_data(part, index, 0, gradient=True)
            gradient, logs = self._matching_gradient(data.detach(), part, index)
            # d loss / d data = gradient / elements: the surrogate 0.5 |x - sg(x - g)|^2.
            total = 0.5 * ((data - (data.detach() - gradient)) ** 2).mean()
            if settings.gan_weight:
                fooled = F.softplus(-self._logits(data, part, 0)).mean()
                total, logs = total + settings.gan_weight * fooled, logs | {"loss_gan": fooled}
            return total, {"latent_mean": data.detach().mean(), "latent_std": data.detach().std(), **logs}

        parameters = trainable(self.student)
        logs = mean_logs(batch_gradient(parameters, batch, settings.micro_batch, loss))
        rate = cosine_rate(
            index, steps=settings.steps, peak=settings.learning_rate, warmup=1, final_share=0.1
        )
        norm = optimizer_step(self.optimizers["student"], parameters, settings.clip_norm, rate)
        self.ema.update(self.student)
        return logs | mean_logs(fakes) | {"gradient_norm": norm, "latent_std_ratio": self._watched(logs["latent_std"], index)}

    def _watched(self, latent_std: float, index: int) -> float:
        """latent_std / the teacher's; says so once where it has been out of HEALTHY_STD for ALARM_STEPS steps."""
        ratio = latent_std / self.teacher_std
        self.alarmed = 0 if HEALTHY_STD[0] <= ratio <= HEALTHY_STD[1] else self.alarmed + 1
        if self.alarmed == ALARM_STEPS:
            print(
                f"dmd2: at step {index} the student's latents spread {ratio:.2f} times as wide as the teacher's: raise fake_steps or"
                " fake_learning_rate, or lower learning_rate or guidance_scale", file=sys.stderr,
            )  # fmt: skip
        return ratio

    @torch.no_grad()
    def _teacher_std(self) -> float:
        """Standard deviation of latents that the guided teacher draws in the student's steps."""
        batch = self._batch(0, 0).split(self.settings.micro_batch)[0].to(self.device)
        noise = keyed_normal((*self.key, 8, 0), batch.positions, tuple(batch.condition.shape[1:]), self.device)
        return sample(batch.guided(self.teacher, self.settings), noise, self._sigmas(batch)).std().item()

    def _sigmas(self, batch: Batch) -> list[float]:
        """The deployed sigmas for the panels of a batch."""
        return deployed_sigmas(self.settings.student_steps, *batch.condition.shape[2:])

    def _batch(self, index: int, number: int) -> Batch:
        # Each inner step has rows of its own: the plan's step counts all of them. Warm-up steps of the fake score read ahead the rows
        # of steps to come, with draws of their own.
        inner = index * (self.settings.fake_steps + 1) + number
        indices, positions = self.plan.indices(inner)
        return self.rows.batch(indices, positions, with_target=self.settings.reads_targets)

    def _student_data(self, batch: Batch, index: int, number: int, *, gradient: bool) -> torch.Tensor:
        """Backward simulation: run the student's own steps to a drawn exit, then one step to the clean estimate."""
        exit_index = int(keyed_uniform((*self.key, 7, number), [index], 1).item() * self.settings.student_steps)
        x = keyed_normal((*self.key, 8, number), batch.positions, tuple(batch.condition.shape[1:]), self.device)
        sigmas = self._sigmas(batch)
        with torch.no_grad():
            for sigma, following in zip(sigmas[:exit_index], sigmas[1 : exit_index + 1], strict=True):
                x = x + (following - sigma) * self._velocity(self.student, x, sigma, batch)
        with torch.set_grad_enabled(gradient):
            sigma = sigmas[exit_index]
            return x - sigma * self._velocity(self.student, x, sigma, batch)

    def _fake_step(self, index: int, number: int) -> dict[str, float]:
        """One step of the fake score, and of the discriminator on the same detached rows where there is one."""
        settings = self.settings
        batch = self._batch(index, 1 + number)

        def loss(part: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            data = self._student_data(part, index, 1 + number, gradient=False)
            noise = keyed_normal((*self.key, 9, number), part.positions, tuple(data.shape[1:]), self.device)
            times = keyed_uniform((*self.key, 10, number), part.positions, 1, self.device)[:, 0]
            velocity = self._predict(self.fake, interpolate(data, noise, times), times, part)
            matched = ((velocity - (noise - data)) ** 2).mean()
            if not settings.gan_weight:
                return matched, {"loss_fake": matched}
            drawn, real = self._logits(data, part, 1 + number), self._logits(part.latents, part, 1 + number)
            told_apart = F.softplus(drawn).mean() + F.softplus(-real).mean()
            right = ((drawn < 0).float().mean() + (real > 0).float().mean()) / 2
            logs = {"loss_fake": matched, "loss_discriminator": told_apart, "discriminator_accuracy": right}
            return matched + settings.gan_fake_weight * told_apart, logs

        logs = mean_logs(batch_gradient(self.scored_by, batch, settings.micro_batch, loss))
        norm = optimizer_step(self.optimizers["fake"], self.scored_by, settings.clip_norm, settings.fake_learning_rate)
        return {name: value for name, value in logs.items() if name != "loss"} | {"gradient_norm_fake": norm}

    def _logits(self, data: torch.Tensor, batch: Batch, number: int) -> torch.Tensor:
        """The discriminator's logits [B] of rows noised to drawn times; data and the student's rows are noised alike."""
        times = self.settings.gan_time_high * keyed_uniform((*self.key, 13, number), batch.positions, 1, self.device)[:, 0]
        noise = keyed_normal((*self.key, 14, number), batch.positions, tuple(data.shape[1:]), self.device)
        return self.discriminator(middle_features(self.fake, interpolate(data, noise, times), times, batch, self.settings.precision))

    @torch.no_grad()
    def _matching_gradient(
        self, data: torch.Tensor, batch: Batch, index: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The gradient at a drawn score time: descending it pulls the student to the guided teacher."""
        settings = self.settings
        span = settings.score_time_high - settings.score_time_low
        drawn = settings.score_time_low + span * keyed_uniform((*self.key, 11), batch.positions, 1, self.device)[:, 0]
        times = shifted(drawn, settings.score_time_shift).clamp(settings.score_time_low, settings.score_time_high)
        noise = keyed_normal((*self.key, 12), batch.positions, tuple(data.shape[1:]), self.device)
        x = interpolate(data, noise, times)
        guided = batch.guided(self.teacher, settings)
        real = data_from_velocity(x, guided(x, times), times)
        fake = data_from_velocity(x, self._predict(self.fake, x, times, batch), times)
        gradient = matching_gradient(data, real, fake)
        logs = {"teacher_gap": (data - real).abs().mean(), "score_gap": (fake - real).abs().mean()}
        return gradient, logs

    def _velocity(self, unet: DreamLiteUNetModel, x: torch.Tensor, sigma: float, batch: Batch) -> torch.Tensor:
        return self._predict(unet, x, torch.full((len(x),), sigma, device=x.device), batch)

    def _predict(self, unet: DreamLiteUNetModel, x: torch.Tensor, times: torch.Tensor, batch: Batch) -> torch.Tensor:
        return predict(unet, x, times, batch.condition, batch.text, batch.size_px, self.settings.precision)


def matching_gradient(data: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """g = (x0_fake - x0_real) / (mean |x - x0_real| + 1e-6), normalised per sample so that batches of any layout agree."""
    return (fake - real) / ((data - real).abs().mean(dim=(1, 2, 3), keepdim=True) + NORMALISER_FLOOR)
