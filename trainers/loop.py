"""The one training loop: step, log, checkpoint, resume.
A recipe owns networks and optimizers; the loop owns time, the log and the state on disk."""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from dreamlite_data.progress import Progress
from trainers.data import Batch
from trainers.nonfinite import NonFiniteError, require_finite, stop
from trainers.parallel import map_threads

LOG_EVERY = 10


class Recipe(Protocol):
    """What the loop drives. `step(index)` does optimizer step `index` and returns its metrics as plain floats; all
    randomness is keyed by `index`, so no random state needs saving."""

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    ema: Ema

    def step(self, index: int) -> dict[str, float]: ...


class Ema:
    """Moving average of a network in float32: e <- b e + (1 - b) w.

    b is `decay`, warmed up as (1 + n) / (10 + n); or, with the relative `width` of a power law, (1 - 1 / n)^(g + 1) (EDM2,
    arXiv 2312.02696, section 3.1). Raises ValueError for weights of less than float32: at small learning rates they stand still.
    """

    def __init__(self, module: nn.Module, decay: float, width: float | None = None) -> None:
        narrow = {str(value.dtype) for value in module.parameters() if value.dtype in (torch.bfloat16, torch.float16)}
        if narrow:
            raise ValueError(f"the weights to train are {', '.join(narrow)}: load them in float32 and set `precision: bfloat16`")
        self.decay, self.updates = decay, 0
        self.exponent = None if width is None else power_exponent(width) + 1
        self.weights = {name: value.detach().float().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Fold in the weights after one optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        if self.exponent is not None:
            decay = (1 - 1 / self.updates) ** self.exponent
        values = module.state_dict()
        torch._foreach_lerp_([self.weights[name] for name in values], [value.float() for value in values.values()], 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        """Load the average into a network."""
        module.load_state_dict(self.weights)


def power_exponent(width: float) -> float:
    """g of a power-law average of relative width s: s^2 = (g + 1) / ((g + 2)^2 (g + 3)), solved as EDM2's appendix C does."""
    return float(max(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real))


def run(recipe: Recipe, *, steps: int, output: Path, label: str, checkpoint_every_s: float = 30.0) -> dict[str, float]:
    """Train to `steps`, resuming from `output`; returns the mean of each metric over the last tenth of the run.

    A recipe with a `stop_reason()` ends the run early where that gives one: then `stopped_at_step` is among the metrics.

    Writes output/metrics.jsonl (one line a logged value) and output/state.pt (weights, optimizers, average, position),
    the latter at most every `checkpoint_every_s` seconds and renamed into place: a kill -9 loses that much at most.
    Raises FloatingPointError with the step's number where a loss, gradient or metric is not finite; see `nonfinite` for its rows.
    """
    output.mkdir(parents=True, exist_ok=True)
    start = _resume(recipe, output)
    log_path = output / "metrics.jsonl"
    _drop_lines_after(log_path, start)
    saved_at = time.monotonic()
    window: dict[str, list[float]] = {}
    with log_path.open("a") as log, Progress(label, total=steps, unit="steps", done=start) as bar:
        done, stopped = start, None
        for index in range(start, steps):
            stopped = _stop_reason(recipe)
            if stopped:
                break
            try:
                metrics = recipe.step(index)
            except NonFiniteError as error:
                raise stop(error, label, index, output) from None
            broken = [name for name, value in metrics.items() if not math.isfinite(value)]
            if broken:
                raise FloatingPointError(f"{label}: {', '.join(broken)} is not finite at step {index}; lower the learning rate")
            for name, value in metrics.items():
                window.setdefault(name, []).append(value)
            done = index + 1
            if done % LOG_EVERY == 0 or done == steps:
                for name, values in window.items():
                    mean = sum(values[-LOG_EVERY:]) / len(values[-LOG_EVERY:])
                    log.write(json.dumps({"position": done, "name": name, "value": mean}) + "\n")
                log.flush()
            bar.advance(1, **{name: round(value, 4) for name, value in metrics.items() if name in {"loss", "reward"}})
            if time.monotonic() - saved_at >= checkpoint_every_s:
                _save(recipe, done, output)
                saved_at = time.monotonic()
    _save(recipe, done, output)
    tail = max(1, done // 10)
    means = {name: sum(values[-tail:]) / len(values[-tail:]) for name, values in window.items()}
    if stopped:
        print(f"{label} stopped after {done} of {steps} steps: {stopped}", file=sys.stderr)
        means["stopped_at_step"] = float(done)
    return means


def _stop_reason(recipe: Recipe) -> str | None:
    """What a recipe that watches itself has against a further step. It is asked before each, so a resumed run asks first too."""
    ask = getattr(recipe, "stop_reason", None)
    return ask() if ask else None


def batch_gradient(
    parameters: Sequence[nn.Parameter], batch: Batch, micro_batch: int, loss: Callable[[Batch], tuple[torch.Tensor, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Set `.grad` to the gradient of the mean over the batch; `loss` of a micro-batch returns its mean and what to log.

    Micro-batches run side by side on the threads there are and are summed in their order, so threads change no bit.
    """

    def one(part: Batch) -> tuple[tuple[torch.Tensor | None, ...], dict[str, Any]]:
        value, logs = loss(part)
        share = len(part.rows) / len(batch.rows)
        gradients = torch.autograd.grad(value * share, parameters, allow_unused=True)
        require_finite(value, gradients, part, parameters, loss)
        return gradients, {"loss": value.item(), **logs}

    results = list(map_threads(one, batch.split(micro_batch)))
    total = results[0][0]
    used = [index for index, gradient in enumerate(total) if gradient is not None]
    for gradients, _ in results[1:]:
        torch._foreach_add_([total[index] for index in used], [gradients[index] for index in used])
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient
    return [logs for _, logs in results]


def mean_logs(logs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each value over micro-batches of one size."""
    return {name: sum(values[name] for values in logs) / len(logs) for name in logs[0]}


def optimizer_step(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], clip_norm: float, rate: float) -> float:
    """Clip the gradients, step at learning rate `rate`; returns the gradient norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return float(norm)


def cosine_rate(index: int, *, steps: int, peak: float, warmup: int, final_share: float) -> float:
    """Linear warm-up, then a cosine from `peak` to `final_share` x `peak`: a pure function of the step."""
    if index < warmup:
        return peak * (index + 1) / warmup
    progress = (index - warmup) / max(1, steps - warmup)
    return peak * (final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress)))


def _save(recipe: Recipe, position: int, output: Path) -> None:
    state = {
        "position": position,
        "modules": {name: module.state_dict() for name, module in recipe.modules.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in recipe.optimizers.items()},
        "ema": recipe.ema.weights,
        "ema_updates": recipe.ema.updates,
    }
    partial = output / "state.partial"
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(output / "state.pt")


def _resume(recipe: Recipe, output: Path) -> int:
    path = output / "state.pt"
    if not path.is_file():
        return 0
    try:
        state = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}): remove it, and the stage begins again") from None
    try:
        for name, module in recipe.modules.items():
            module.load_state_dict(state["modules"][name])
        for name, optimizer in recipe.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not of this stage's network and settings ({str(error).splitlines()[0]}): give another output folder") from None
    recipe.ema.weights, recipe.ema.updates = state["ema"], state["ema_updates"]
    return int(state["position"])


def _drop_lines_after(path: Path, position: int) -> None:
    if path.is_file():
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["position"] <= position:
                    kept.append(line)
            except ValueError:  # the line that a kill cut off
                continue
        path.write_text("".join(line + "\n" for line in kept))
