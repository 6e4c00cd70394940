"""Reward feedback learning: a guided rollout without gradient, one denoising step with it, decode, score, push.
A velocity penalty holds the network near its start; rewards are normalised per task by the start model's scores."""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny, DreamLiteUNetModel
from torch.nn import functional as F

from dreamlite_data.rewards import RewardModel, Scorer
from dreamlite_data.rewards.preprocess import HIGHEST_VALUE, LOWEST_VALUE, straight_through_clamp
from trainers.batch_plan import Plan
from trainers.data import Batch, TrainingRows
from trainers.flow import data_from_velocity, deployed_sigmas, keyed_normal, keyed_uniform, predict, steps_within
from trainers.loop import Ema, batch_gradient, mean_logs, optimizer_step
from trainers.lora import frozen_copy, trainable
from trainers.nonfinite import NonFiniteError
from trainers.parallel import map_threads
from trainers.recipes.detectors import change_outside_edit, picture_measures
from trainers.recipes.second_scorer import HackingWatch
from trainers.settings import ReFLSettings

BASELINE_BATCHES = 2  # batches of each task that fix the start model's mean and spread of reward


class ReFLRecipe:
    """Both tasks, in alternating batches, so that each reward model sees one kind of row a step."""

    def __init__(
        self,
        unet: DreamLiteUNetModel,
        vae: AutoencoderTiny,
        rewards: dict[str, RewardModel],
        rows: TrainingRows,
        settings: ReFLSettings,
        key: tuple[int, ...],
        second_scorers: dict[str, Scorer] | None = None,
    ) -> None:
        self.unet, self.vae, self.rewards, self.rows = unet.train(), vae, rewards, rows
        self.settings, self.key, self.device = settings, key, trainable(unet)[0].device
        self.reference = frozen_copy(unet)
        self.plans = {task: Plan(rows.pools(), {task: 1.0}, settings.batch, key) for task in ("generate", "edit")}
        optimizer = torch.optim.AdamW(trainable(unet), lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
        self.watch = HackingWatch(second_scorers or {}, settings)
        self.modules, self.optimizers = {"unet": unet}, {"unet": optimizer}
        if self.watch.scorers:
            self.modules["watch"] = self.watch
        self.ema = Ema(unet, settings.ema_decay, settings.ema_width)
        self.baseline = {task: self._baseline(task) for task in self.plans}

    def step(self, index: int) -> dict[str, float]:
        """One step on one task; generate on even steps, edit on odd ones."""
        settings = self.settings
        task = "generate" if index % 2 == 0 else "edit"
        batch = self._batch(task, index)
        draw = keyed_uniform((*self.key, 5), [index], 1).item()
        exits = self._exits(batch)
        exit_index = exits[int(draw * len(exits))]
        mean, spread = self.baseline[task]

        def loss(part: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            x, t, velocity, data = self._estimate(self.unet, part, exit_index)
            images, sources = decode01(self.vae, data), self._sources(task, part)
            if not images.isfinite().all():  # a reward would refuse it without a word about the rows
                raise NonFiniteError("the image", part.rows)
            reward = self.rewards[task].differentiable(images, [row.text for row in part.rows], *sources)
            scaled = (reward - mean) / spread
            with torch.no_grad():
                anchor = self._predict(self.reference, x, t, part)
            drift = F.mse_loss(velocity, anchor)
            hinge, active = hinge_loss(scaled, settings.hinge, settings.hinge_margin)
            ratios = norm_ratios(velocity, anchor)
            total = settings.reward_weight * hinge + settings.velocity_weight * drift
            if settings.norm_guard_weight:
                total = total + settings.norm_guard_weight * F.relu(ratios - 1).mean()
            measures = picture_measures(images)
            if sources and (change := change_outside_edit(images, *sources, part.weight)) is not None:
                measures["change_outside_edit"] = change
            return total, {
                f"reward_{task}": reward.mean(),
                f"reward_{task}_scaled": scaled.mean(),
                "active_share": active,
                "drift": drift,
                "velocity_norm_ratio": ratios.mean(),
                **{f"{name}_{task}": value for name, value in measures.items()},
            }

        parameters = trainable(self.unet)
        logs = batch_gradient(parameters, batch, settings.micro_batch, loss)
        norm = optimizer_step(self.optimizers["unet"], parameters, settings.clip_norm, settings.learning_rate)
        self.ema.update(self.unet)
        compared = self._compare(task, batch) if self.watch.due(task, index // 2) else {}
        return mean_logs(logs) | {"gradient_norm": norm} | compared

    def stop_reason(self) -> str | None:
        """Why no further step may be taken; None while all is well."""
        return self.watch.stop_reason()

    @torch.no_grad()
    def _compare(self, task: str, batch: Batch) -> dict[str, float]:
        """Both scorers on images of this model and of the start model, of the same prompts and noise."""
        batch, drawn = batch.to(self.device), []
        for unet in (self.unet, self.reference):
            parts = batch.split(self.settings.micro_batch)
            drawn.append(torch.cat(list(map_threads(lambda part, unet=unet: self._estimate(unet, part, self._exits(part)[-1])[-1], parts))))
        reward_now, reward_start = (self._reward(task, batch, latents).mean().item() for latents in drawn)
        now, start = (decode01(self.vae, latents) for latents in drawn)
        second = self.watch.second_gain(task, now, start, [row.text for row in batch.rows], *(self._sources(task, batch) or (None,)))
        return self.watch.record(task, (reward_now - reward_start) / self.baseline[task][1], second)

    def _batch(self, task: str, index: int) -> Batch:
        indices, positions = self.plans[task].indices(index // 2)
        return self.rows.batch(indices, positions, with_target=False)

    def _estimate(self, unet: DreamLiteUNetModel, batch: Batch, stop: int) -> tuple[torch.Tensor, ...]:
        """(x, t, velocity, clean estimate) at step `stop` of the rollout; only the last network call has a graph."""
        x = self._rollout(unet, batch, stop)
        t = torch.full((len(x),), self._sigmas(batch)[stop], device=x.device)
        velocity = self._predict(unet, x, t, batch)
        return x, t, velocity, data_from_velocity(x, velocity, t)

    @torch.no_grad()
    def _rollout(self, unet: DreamLiteUNetModel, batch: Batch, stop: int) -> torch.Tensor:
        """Guided Euler steps 0..stop-1 exactly as deployed."""
        velocity, sigmas = batch.guided(unet, self.settings), self._sigmas(batch)
        x = keyed_normal((*self.key, 6), batch.positions, tuple(batch.condition.shape[1:]), batch.device)
        for sigma, following in zip(sigmas[:stop], sigmas[1 : stop + 1], strict=True):
            x = x + (following - sigma) * velocity(x, sigma)
        return x

    def _predict(self, unet: DreamLiteUNetModel, x: torch.Tensor, t: torch.Tensor, batch: Batch) -> torch.Tensor:
        return predict(unet, x, t, batch.condition, batch.text, batch.size_px, self.settings.precision)

    def _sigmas(self, batch: Batch) -> list[float]:
        """The deployed sigmas for the panels of a batch."""
        return deployed_sigmas(self.settings.rollout_steps, *batch.condition.shape[2:])

    def _exits(self, batch: Batch) -> list[int]:
        """Steps of the rollout that may get the gradient; raises ValueError where no sigma lies in the range."""
        settings, sigmas = self.settings, self._sigmas(batch)
        exits = steps_within(sigmas, settings.sigma_low, settings.sigma_high)
        if not exits:
            listed = ", ".join(f"{sigma:.3f}" for sigma in sigmas[:-1])
            raise ValueError(
                f"no rollout step has a sigma between {settings.sigma_low} and {settings.sigma_high}: the steps are at"
                f" {listed}; widen sigma_low and sigma_high or change rollout_steps"
            )
        return exits

    @torch.no_grad()
    def _sources(self, task: str, batch: Batch) -> tuple[torch.Tensor, ...]:
        """The source images of edits, as the last argument of a reward; nothing for generated rows."""
        return (decode01(self.vae, batch.condition),) if task == "edit" else ()

    def _reward(self, task: str, batch: Batch, latents: torch.Tensor) -> torch.Tensor:
        images, prompts = decode01(self.vae, latents), [row.text for row in batch.rows]
        return self.rewards[task].differentiable(images, prompts, *self._sources(task, batch))

    @torch.no_grad()
    def _baseline(self, task: str) -> tuple[float, float]:
        def score(part: Batch) -> torch.Tensor:
            *_, data = self._estimate(self.reference, part, self._exits(part)[-1])
            return self._reward(task, part, data)

        batches = [self._batch(task, 2 * index).to(self.device) for index in range(BASELINE_BATCHES)]
        parts = [part for batch in batches for part in batch.split(self.settings.micro_batch)]
        joined = torch.cat(list(map_threads(score, parts)))
        return joined.mean().item(), max(joined.std().item(), 1e-3)


def hinge_loss(reward: torch.Tensor, side: str, margin: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, active share). `cap`: mean max(0, b - r), pushes until b (the original ReFL shape); `above`: the
    literal -max(0, r - b), whose gradient exists only above b; `none`: -r."""
    if side == "cap":
        return F.relu(margin - reward).mean(), (reward < margin).float().mean()
    if side == "above":
        return -F.relu(reward - margin).mean(), (reward > margin).float().mean()
    return -reward.mean(), reward.new_ones(())


def norm_ratios(velocity: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """|v| / |v_ref| of each row [B]. NormGuard (arXiv 2606.27771) penalises max(0, ratio - 1), for rewards inflate the velocity by
    5 to 15 % and scaling it back when sampling mends nothing."""
    return velocity.flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)


def decode01(vae: AutoencoderTiny, latents: torch.Tensor) -> torch.Tensor:
    """Latents to images in about [0, 1]: the reward clamps them with a straight-through gradient, and here it is done where a pixel is so
    far out that the reward would take the image for one of another range."""
    return straight_through_clamp(vae.decoder(latents).add(1).div(2), LOWEST_VALUE, HIGHEST_VALUE)
