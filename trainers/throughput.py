"""How fast a training runs: samples and floating point operations a second, and the share of the time that waits for data.
Counts what others do; computes nothing that training reads."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from dreamlite_data.rewards.plan import GPUS

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
_waited_s = 0.0


def counts_as_data_wait(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Mark a function whose time the network spends waiting for its batch."""

    @functools.wraps(function)
    def timed(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        global _waited_s
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            _waited_s += time.perf_counter() - started

    return timed


class Throughput:
    """Rates since the last reading, and over all. `flops_per_sample` is the work of one sample of a global batch without
    recomputation (`trainers.compute`), `processes` how many devices share it."""

    def __init__(self, samples_per_step: int, flops_per_sample: float | None = None, processes: int = 1) -> None:
        self.samples_per_step, self.flops_per_sample = samples_per_step, flops_per_sample
        peak = peak_flops()
        self.peak = None if peak is None else peak * processes
        self._first = self._last = (0, time.perf_counter(), _waited_s)
        self._steps = 0

    def step_done(self) -> None:
        """Count one optimizer step."""
        self._steps += 1

    def since_last(self) -> dict[str, float]:
        """Rates since the call before."""
        before, self._last = self._last, self._now()
        return self._rates(before, self._last)

    def overall(self) -> dict[str, float]:
        """Rates since the beginning of this process; nothing where it did no step."""
        return self._rates(self._first, self._now())

    def _now(self) -> tuple[int, float, float]:
        return self._steps, time.perf_counter(), _waited_s

    def _rates(self, before: tuple[int, float, float], now: tuple[int, float, float]) -> dict[str, float]:
        steps, seconds, waited = (b - a for a, b in zip(before, now, strict=True))
        if not steps or seconds <= 0:
            return {}
        samples = steps * self.samples_per_step
        rates = {"samples_per_s": samples / seconds, "data_wait_share": waited / seconds}
        if self.flops_per_sample:
            rates["tflops_per_s"] = self.flops_per_sample * samples / seconds / 1e12
            if self.peak:
                rates["mfu"] = self.flops_per_sample * samples / seconds / self.peak
        return rates


def peak_flops() -> float | None:
    """Peak dense bfloat16 FLOP/s of this process's GPU; None on CPUs and for GPUs whose data sheet is not in the table."""
    if not torch.cuda.is_available():
        return None
    seen = torch.cuda.get_device_name().lower()
    if "pcie" in seen:
        return None  # the table's figures are of the SXM boards
    return next((tflops * 1e12 for name, (tflops, _) in GPUS.items() if name.split(" ")[0].lower() in seen.split()), None)
