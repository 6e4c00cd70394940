"""Distribution matching distillation (DMD2, arXiv 2405.14867) in flow form: a guided teacher, a few-step student.
The student is trained on its own deployed Euler rollouts; a second network learns the student's score."""

from __future__ import annotations

import torch
from diffusers import DreamLiteUNetModel

from trainers.data import Batch, Plan, TrainingRows
from trainers.flow import (
    data_from_velocity,
    deployed_sigmas,
    interpolate,
    keyed_normal,
    keyed_uniform,
    predict,
)
from trainers.loop import Ema, batch_gradient, cosine_rate, mean_logs, optimizer_step
from trainers.lora import frozen_copy, has_adapter, trainable, trainable_copy
from trainers.settings import DMD2Settings

NORMALISER_FLOOR = 1e-6


class DMD2Recipe:
    """Student and fake score start as copies of the teacher; one step is `fake_steps` of the fake, one of the student."""

    def __init__(
        self, teacher: DreamLiteUNetModel, rows: TrainingRows, settings: DMD2Settings, key: tuple[int, ...]
    ) -> None:
        self.student, self.fake = trainable_copy(teacher), trainable_copy(teacher)
        self.teacher = frozen_copy(teacher) if has_adapter(teacher) else teacher.eval().requires_grad_(False)
        self.rows, self.settings, self.key = rows, settings, key
        self.plan = Plan(rows, {"generate": 0.5, "edit": 0.5}, settings.batch, key)
        self.sigmas = deployed_sigmas(settings.student_steps, rows.side, rows.side)
        self.modules = {"student": self.student, "fake": self.fake}
        self.optimizers = {
            "student": torch.optim.AdamW(trainable(self.student), weight_decay=0.0, betas=(0.0, 0.99)),
            "fake": torch.optim.AdamW(trainable(self.fake), weight_decay=0.0, betas=(0.0, 0.99)),
        }
        self.ema = Ema(self.student, settings.ema_decay)

    def step(self, index: int) -> dict[str, float]:
        """Fake-score steps first, so that the student's gradient comes from a fake that knows it."""
        settings = self.settings
        warmup = settings.fake_warmup_steps if index == 0 else 0
        fakes = [self._fake_step(index, number) for number in range(settings.fake_steps + warmup)]
        batch = self._batch(index, 0)

        def loss(part: Batch) -> tuple[torch.Tensor, dict[str, float]]:
            data = self._student_data(part, index, 0, gradient=True)
            gradient, logs = self._matching_gradient(data.detach(), part, index)
            # d loss / d data = gradient / elements: the surrogate 0.5 |x - sg(x - g)|^2.
            return 0.5 * ((data - (data.detach() - gradient)) ** 2).mean(), {"latent_std": data.detach().std().item(), **logs}

        parameters = trainable(self.student)
        logs = batch_gradient(parameters, batch, settings.micro_batch, loss)
        rate = cosine_rate(
            index, steps=settings.steps, peak=settings.learning_rate, warmup=1, final_share=0.1
        )
        norm = optimizer_step(self.optimizers["student"], parameters, settings.clip_norm, rate)
        self.ema.update(self.student)
        return mean_logs(logs) | {"loss_fake": sum(fakes) / len(fakes), "gradient_norm": norm}

    def _batch(self, index: int, number: int) -> Batch:
        # Each inner step has rows of its own: the plan's step counts all of them.
        inner = index * (self.settings.fake_steps + 1) + number
        indices, positions = self.plan.indices(inner)
        return self.rows.batch(indices, positions, with_target=False)

    def _student_data(self, batch: Batch, index: int, number: int, *, gradient: bool) -> torch.Tensor:
        """Backward simulation: run the student's own steps to a drawn exit, then one step to the clean estimate."""
        exit_index = int(keyed_uniform((*self.key, 7, number), [index], 1).item() * self.settings.student_steps)
        x = keyed_normal((*self.key, 8, number), batch.positions, tuple(batch.condition.shape[1:]))
        with torch.no_grad():
            for sigma, following in zip(self.sigmas[:exit_index], self.sigmas[1 : exit_index + 1], strict=True):
                x = x + (following - sigma) * self._velocity(self.student, x, sigma, batch)
        with torch.set_grad_enabled(gradient):
            sigma = self.sigmas[exit_index]
            return x - sigma * self._velocity(self.student, x, sigma, batch)

    def _fake_step(self, index: int, number: int) -> float:
        settings = self.settings
        batch = self._batch(index, 1 + number)

        def loss(part: Batch) -> tuple[torch.Tensor, dict[str, float]]:
            data = self._student_data(part, index, 1 + number, gradient=False)
            noise = keyed_normal((*self.key, 9, number), part.positions, tuple(data.shape[1:]))
            times = keyed_uniform((*self.key, 10, number), part.positions, 1)[:, 0]
            velocity = predict(self.fake, interpolate(data, noise, times), times, part.condition, part.text, self.rows.size_px)
            return ((velocity - (noise - data)) ** 2).mean(), {}

        parameters = trainable(self.fake)
        logs = batch_gradient(parameters, batch, settings.micro_batch, loss)
        optimizer_step(self.optimizers["fake"], parameters, settings.clip_norm, settings.fake_learning_rate)
        return mean_logs(logs)["loss"]

    @torch.no_grad()
    def _matching_gradient(
        self, data: torch.Tensor, batch: Batch, index: int
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The gradient at a drawn score time: descending it pulls the student to the guided teacher."""
        settings = self.settings
        span = settings.score_time_high - settings.score_time_low
        times = settings.score_time_low + span * keyed_uniform((*self.key, 11), batch.positions, 1)[:, 0]
        noise = keyed_normal((*self.key, 12), batch.positions, tuple(data.shape[1:]))
        x = interpolate(data, noise, times)
        guided = batch.guided(self.teacher, self.rows.size_px, settings)
        real = data_from_velocity(x, guided(x, times), times)
        fake_velocity = predict(self.fake, x, times, batch.condition, batch.text, self.rows.size_px)
        fake = data_from_velocity(x, fake_velocity, times)
        gradient = matching_gradient(data, real, fake)
        logs = {"teacher_gap": (data - real).abs().mean().item(), "score_gap": (fake - real).abs().mean().item()}
        return gradient, logs

    def _velocity(self, unet: DreamLiteUNetModel, x: torch.Tensor, sigma: float, batch: Batch) -> torch.Tensor:
        times = torch.full((len(x),), sigma)
        return predict(unet, x, times, batch.condition, batch.text, self.rows.size_px)


def matching_gradient(data: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """g = (x0_fake - x0_real) / (mean |x - x0_real| + 1e-6), normalised per sample so that batches of any layout agree."""
    return (fake - real) / ((data - real).abs().mean(dim=(1, 2, 3), keepdim=True) + NORMALISER_FLOOR)
