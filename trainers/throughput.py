"""How fast a training runs: samples and floating point operations a second, and the share of the time that waits for data.
Counts what others do; computes nothing that training reads."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

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
    recomputation, `peak_flops` what the devices that share the batch can do in a second (`trainers.compute` knows both)."""

    def __init__(self, samples_per_step: int, flops_per_sample: float | None = None, peak_flops: float | None = None) -> None:
        self.samples_per_step, self.flops_per_sample, self.peak_flops = samples_per_step, flops_per_sample, peak_flops
        self._steps = 0
        self._first = self._last = self._now()

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
            if self.peak_flops:
                rates["mfu"] = self.flops_per_sample * samples / seconds / self.peak_flops
        return rates

