"""The bench harness: a measurement is one printed line, `BENCH name value target ok|short`.
Falling short is reported and never fails, for a busy machine is not a broken program; a wrong result still fails."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest


class Bench:
    """Prints measurements against their targets."""

    def __call__(self, name: str, value: float, target: float, *, higher_is_better: bool = False) -> None:
        """One line. The unit is part of the name (`_s`, `_ms`, `_mb`, `_per_s`); lower is better unless said otherwise."""
        met = value >= target if higher_is_better else value <= target
        print(f"\nBENCH {name} {value:.4g} {target:g} {'ok' if met else 'short'}", end="", flush=True)

    @contextmanager
    def seconds(self, name: str, target: float) -> Iterator[None]:
        """Measure the wall time of the block."""
        started = time.perf_counter()
        yield
        self(name, time.perf_counter() - started, target)

    @staticmethod
    def best_of(count: int, work: Callable[[], object]) -> float:
        """Shortest wall time in seconds of `count` tries: the one that was disturbed least."""
        times = []
        for _ in range(count):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return min(times)


@pytest.fixture(scope="session")
def bench() -> Bench:
    return Bench()
