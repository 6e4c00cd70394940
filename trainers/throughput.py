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
    """Rates since the last reading, and over all. `peak_flops` is what the devices that share a batch can do in a second."""

    def __init__(self, peak_flops: float | None = None) -> None:
        self.peak_flops = peak_flops
        self._samples, self._flops = 0, 0.0
        self._first = self._last = self._now()

    def step_done(self, samples: int, flops: float) -> None:
        """Count one optimizer step: its samples, and their work without recomputation (0 where it is not known)."""
        self._samples, self._flops = self._samples + samples, self._flops + flops

    def since_last(self) -> dict[str, float]:
        """Rates since the call before."""
        before, self._last = self._last, self._now()
        return self._rates(before, self._last)

    def overall(self) -> dict[str, float]:
        """Rates since the beginning of this process; nothing where it did no step."""
        return self._rates(self._first, self._now())

    def _now(self) -> tuple[float, ...]:
        return self._samples, self._flops, time.perf_counter(), _waited_s

    def _rates(self, before: tuple[float, ...], now: tuple[float, ...]) -> dict[str, float]:
        samples, flops, seconds, waited = (b - a for a, b in zip(before, now, strict=True))
        if not samples or seconds <= 0:
            return {}
        rates = {"samples_per_s": samples / seconds, "data_wait_share": waited / seconds}
        if flops:
            rates["tflops_per_s"] = flops / seconds / 1e12
            if self.peak_flops:
                rates["mfu"] = flops / seconds / self.peak_flops
        return rates
