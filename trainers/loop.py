"""The one training loop: step, log, checkpoint, resume; in one process or in many that share each global batch.
A recipe owns networks and optimizers; the loop owns time, the log and the state on disk."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pickle
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TextIO

import numpy as np
import torch
from torch import nn

from dreamlite_data.progress import Progress
from dreamlite_data.strict_settings import StrictSettings
from trainers.data import Batch
from trainers.distributed import as_the_first_says, copy_from_first, gathered, own_share, sum_over_processes, wait_for_all, world
from trainers.lora import load_trained_state, trained_state
from trainers.nonfinite import NonFiniteError, are_finite, broken_rows, stop
from trainers.parallel import map_threads
from trainers.throughput import Throughput

LOG_EVERY = 10
ROWS = "rows"
"""Among the logs of a micro-batch: how many rows it has."""
SAVING_SHARE = 0.05
"""Of the time, at most, goes into writing checkpoints: large ones are written less often than was asked."""
FREE_TO_CHANGE = {"micro_batch": True, "size_phases": {"__all__": {"micro_batch"}}, "second_scorers": {"__all__": {"model"}}}
"""Settings that may differ when a training is resumed: what only rounds, and where a second scorer lies."""
FINITE = "finite"
"""Among the logs of a micro-batch until they are read: whether its loss and its gradients are finite."""


class Recipe(Protocol):
    """What the loop drives. `step(index)` does optimizer step `index` and returns its metrics as plain floats; all
    randomness is keyed by `index`, so no random state needs saving."""

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    ema: Ema
    settings: StrictSettings  # its `batch` is the number of rows of one global batch
    key: tuple[int, ...]  # fixes every draw

    def step(self, index: int) -> dict[str, float]: ...


class Ema:
    """Moving average of a network, or of the part of it that trains, in float32: e <- b e + (1 - b) w.

    b is `decay`, warmed up as (1 + n) / (10 + n); or, with the relative `width` of a power law, (1 - 1 / n)^(g + 1) (EDM2,
    arXiv 2312.02696, section 3.1). Raises ValueError for weights of less than float32: at small learning rates they stand still.
    """

    def __init__(self, module: nn.Module, decay: float, width: float | None = None) -> None:
        narrow = {str(value.dtype) for value in module.parameters() if value.requires_grad and value.dtype in (torch.bfloat16, torch.float16)}
        if narrow:
            raise ValueError(f"the weights to train are {', '.join(narrow)}: load them in float32 and set `precision: bfloat16`")
        self.decay, self.updates = decay, 0
        self.exponent = None if width is None else power_exponent(width) + 1
        self.weights = {name: value.detach().float().clone() for name, value in trained_state(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Fold in the weights after one optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        if self.exponent is not None:
            decay = (1 - 1 / self.updates) ** self.exponent
        values = trained_state(module)
        torch._foreach_lerp_([self.weights[name] for name in values], [value.float() for value in values.values()], 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        """Load the average into a network."""
        load_trained_state(module, self.weights)


def power_exponent(width: float) -> float:
    """g of a power-law average of relative width s: s^2 = (g + 1) / ((g + 2)^2 (g + 3)), solved as EDM2's appendix C does."""
    return float(max(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real))


def run(
    recipe: Recipe,
    *,
    steps: int,
    output: Path,
    label: str,
    checkpoint_every_s: float = 30.0,
    flops_per_sample: Callable[[int], float] | None = None,
    peak_flops: float | None = None,
    on_checkpoint: Callable[[int, Mapping[str, float]], None] | None = None,
    made_of: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, float]:
    """Train to `steps`, resuming from `output`; returns the mean of each metric over the last tenth of the run.

    A recipe with a `stop_reason()` ends the run early where that gives one: then `stopped_at_step` is among the metrics.

    Writes output/metrics.jsonl (one line a logged value) and output/state.pt (weights, optimizers, average, position),
    the latter every `checkpoint_every_s` seconds, or twenty times as long as it takes to write where that is more, and renamed into place:
    a kill -9 loses that much at most.
    The position counts steps, and so rows of the plan: it holds for any number of processes, which may change with a resume.
    Of several processes the first one writes; `output` must be a folder that all of them see. `on_checkpoint` is called in
    each of them after a checkpoint, with the position and the newest metrics. `flops_per_sample` of a step is logged as a rate,
    and as a share of `peak_flops` (of all processes) where that is known. `made_of` is what the training rests on beside the
    recipe's settings and key, such as its data: a checkpoint made with anything else is refused.
    Raises FloatingPointError with the step's number where a loss, gradient or metric is not finite (see `nonfinite` for
    its rows), RuntimeError where another training writes to `output`, ValueError where the checkpoint there is damaged or of another
    training.
    """
    output.mkdir(parents=True, exist_ok=True)
    kept = max(LOG_EVERY, steps // 10)
    identity = {"key": list(recipe.key), **recipe.settings.model_dump(mode="json", exclude=FREE_TO_CHANGE), **made_of}
    with _log_of_the_first(output) as log:
        start, window = _resume(recipe, output, kept, identity)
        _begin_alike(recipe, start, output)
        _drop_lines_after(log, start)
        rates, rows = Throughput(peak_flops), recipe.settings.batch
        saved_at, pause = time.monotonic(), checkpoint_every_s
        done, stopped = start, None
        with Progress(label, total=steps, unit="steps", done=start) as bar:
            for index in range(start, steps):
                stopped = _stop_reason(recipe)
                if stopped:
                    break
                try:
                    metrics = recipe.step(index)
                except NonFiniteError as error:
                    raise stop(error, label, index, output) from None
                rates.step_done(rows, rows * flops_per_sample(index) if flops_per_sample else 0.0)
                broken = [name for name, value in metrics.items() if not math.isfinite(value)]
                if broken:
                    raise FloatingPointError(f"{label}: {', '.join(broken)} is not finite at step {index}; lower the learning rate")
                for name, value in metrics.items():
                    window.setdefault(name, deque(maxlen=kept)).append((index, value))
                done = index + 1
                if done % LOG_EVERY == 0 or done == steps:
                    means = {name: _mean(values, done - LOG_EVERY) for name, values in window.items() if values[-1][0] >= done - LOG_EVERY}
                    for name, value in {**means, **rates.since_last()}.items():
                        log.write(json.dumps({"position": done, "name": name, "value": value}) + "\n")
                    log.flush()
                bar.advance(1, **{name: round(value, 4) for name, value in metrics.items() if name in {"loss", "reward"}})
                if _is_due(time.monotonic() - saved_at >= pause, shared=on_checkpoint is not None):
                    started = time.monotonic()
                    _save(recipe, done, window, output, identity)
                    saved_at = time.monotonic()
                    pause = max(checkpoint_every_s, (saved_at - started) / SAVING_SHARE)
                    if on_checkpoint:
                        on_checkpoint(done, metrics)
        _save(recipe, done, window, output, identity)
    wait_for_all()
    means = {name: _mean(values, done - max(1, done // 10)) for name, values in window.items()} | rates.overall()
    if on_checkpoint:
        on_checkpoint(done, means)
    if stopped:
        print(f"{label} stopped after {done} of {steps} steps: {stopped}", file=sys.stderr)
        means["stopped_at_step"] = float(done)
    return means


@contextmanager
def _log_of_the_first(output: Path) -> Iterator[TextIO]:
    """metrics.jsonl of the process that writes, held as long as it trains; nothing keeps what the others would log.

    Raises RuntimeError where another training writes here: one whose launcher was killed may live on, and both would spoil the state.
    """
    if not world().first:
        with open(os.devnull, "w") as nothing:
            yield nothing
        return
    with (output / "metrics.jsonl").open("a+") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is training in {output}: end it, or wait for it, and go on then") from None
        yield log


def _mean(values: Sequence[tuple[int, float]], start: int) -> float:
    """Mean of the values of steps from `start` on, or the newest one where there is none: not every step has every metric."""
    newest = [value for step, value in values if step >= start] or [values[-1][1]]
    return sum(newest) / len(newest)


def _begin_alike(recipe: Recipe, start: int, output: Path) -> None:
    """Give every process the weights of the first. Raises RuntimeError where they found different checkpoints."""
    starts = gathered(start)
    if len(set(starts)) > 1:
        raise RuntimeError(
            f"the processes found checkpoints at steps {', '.join(map(str, starts))} in {output}: give a folder that all of them see"
        )
    for module in recipe.modules.values():
        copy_from_first(list(module.state_dict().values()))
    copy_from_first(list(recipe.ema.weights.values()))


def _is_due(due: bool, *, shared: bool) -> bool:
    """Whether this process takes part in a checkpoint now: the first one, and all of them where each is told of it."""
    return as_the_first_says(due) if shared else due and world().first


def _stop_reason(recipe: Recipe) -> str | None:
    """What a recipe that watches itself has against a further step. It is asked before each, so a resumed run asks first too."""
    ask = getattr(recipe, "stop_reason", None)
    return as_the_first_says(ask()) if ask else None


def batch_gradient(
    parameters: Sequence[nn.Parameter], batch: Batch, micro_batch: int, loss: Callable[[Batch], tuple[torch.Tensor, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Set `.grad` to the gradient of the mean over the global batch; `loss` of a micro-batch returns its mean and what to log:
    tensors, which are detached here and read once for the whole step, for a GPU waits for each reading.

    Each process takes its share of the rows, in the plan's order, and moves a micro-batch at a time to where the parameters are.
    Micro-batches run side by side on the threads there are and are summed in their order, so threads change no bit; sums over
    processes differ by rounding. Returns the logs of all micro-batches of all processes, in the order of the rows: floats, and
    tensors on the CPU. Raises NonFiniteError before any `.grad` is set.
    """
    device = parameters[0].device

    def one(part: Batch) -> tuple[tuple[torch.Tensor | None, ...], dict[str, torch.Tensor]]:
        value, logs = loss(part.to(device))
        share = len(part.rows) / len(batch.rows)
        gradients = torch.autograd.grad(value * share, parameters, allow_unused=True)
        logged = {name: each.detach() for name, each in {"loss": value, **logs}.items()}
        return gradients, logged | {FINITE: are_finite(value, gradients)}

    own = batch.split(own_share(len(batch.rows)))[world().rank]
    parts = own.split(micro_batch)
    total: list[torch.Tensor | None] = []
    logs = []
    for gradients, logged in map_threads(one, parts):
        logs.append(logged)
        if not total:
            total = list(gradients)
            used = [index for index, gradient in enumerate(total) if gradient is not None]
        else:
            torch._foreach_add_([total[index] for index in used], [gradients[index] for index in used])
    logs = [logged | {ROWS: len(part.rows)} for part, logged in zip(parts, _read(logs), strict=True)]
    for part, logged in zip(parts, logs, strict=True):
        finite = logged.pop(FINITE).tolist()
        if not all(finite):
            raise broken_rows(finite, part.to(device), parameters, loss)
    sum_over_processes([total[index] for index in used])
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient
    return [logged for part in gathered(logs) for logged in part]


def _read(logs: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """Tensors of one device as floats, or with an axis as float32 on the CPU, all in one transfer."""
    flat = torch.cat([value.float().reshape(-1) for each in logs for value in each.values()]).cpu()
    pieces = iter(flat.split([value.numel() for each in logs for value in each.values()]))
    return [{name: next(pieces) if value.ndim else next(pieces).item() for name, value in each.items()} for each in logs]


def mean_logs(logs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each value over the rows of those micro-batches that have it: the last one may be smaller, and of one row there
    is no diversity."""
    names = dict.fromkeys(name for each in logs for name in each if name != ROWS)
    return {name: _row_mean(name, [each for each in logs if name in each]) for name in names}


def _row_mean(name: str, logs: Sequence[dict[str, float]]) -> float:
    rows = [each.get(ROWS, 1) for each in logs]
    return sum(each[name] * count for each, count in zip(logs, rows, strict=True)) / sum(rows)


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


def _save(recipe: Recipe, position: int, window: Mapping[str, Sequence[float]], output: Path, identity: Mapping[str, Any]) -> None:
    if not world().first:
        return
    state = {
        "identity": dict(identity),
        "position": position,
        "modules": {name: trained_state(module) for name, module in recipe.modules.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in recipe.optimizers.items()},
        "ema": recipe.ema.weights,
        "ema_updates": recipe.ema.updates,
        "window": {name: list(values) for name, values in window.items()},
    }
    state = _on_cpu(state)  # so that it is read alike wherever the training goes on
    partial = output / "state.partial"
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(output / "state.pt")


def _on_cpu(value: Any) -> Any:
    """Tensors in nested dicts and lists, on the CPU; those that are there already are not copied."""
    if isinstance(value, dict):
        return {name: _on_cpu(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_on_cpu(each) for each in value]
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _resume(recipe: Recipe, output: Path, kept: int, identity: Mapping[str, Any]) -> tuple[int, dict[str, deque[float]]]:
    """(position, newest metrics) of the checkpoint in `output`, loaded into the recipe; (0, nothing) where there is none."""
    path = output / "state.pt"
    if not path.is_file():
        return 0, {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}): remove it, and the stage begins again") from None
    began = state.get("identity", {})
    if changed := [name for name in {**began, **identity} if began.get(name) != identity.get(name)]:
        told = "; ".join(f"{name}: {began.get(name)} there, {identity.get(name)} here" for name in changed[:3])
        raise ValueError(f"{path} began as another training ({told}): give another output folder, or set what differs as it was")
    try:
        for name, module in recipe.modules.items():
            load_trained_state(module, state["modules"][name])
        for name, optimizer in recipe.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not of this stage's network and settings ({str(error).splitlines()[0]}): give another output folder") from None
    devices = {name: value.device for name, value in recipe.ema.weights.items()}
    recipe.ema.weights = {name: value.to(devices[name]) for name, value in state["ema"].items()}
    recipe.ema.updates = state["ema_updates"]
    return int(state["position"]), {name: deque(values, maxlen=kept) for name, values in state["window"].items()}


def _drop_lines_after(log: TextIO, position: int) -> None:
    """Take out of the open log what a killed process wrote after its last checkpoint, and the line that the kill cut off."""
    if not log.readable():
        return
    log.seek(0)
    kept = []
    for line in log:
        try:
            if json.loads(line)["position"] <= position:
                kept.append(line)
        except ValueError:
            continue
    log.truncate(0)
    log.writelines(kept)
    log.flush()
