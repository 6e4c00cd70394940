"""Work side by side on threads that each run torch single-threaded: two half batches on two cores beat one batch on both.
The pieces are cut by the caller, never by the number of threads, so more threads change the time and not one bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from trainers.device import CPU

Item = TypeVar("Item")
Result = TypeVar("Result")
_pool: ThreadPoolExecutor | None = None


def use_threads(count: int | None = None, device: torch.device = CPU) -> int:
    """Let `map_threads` use `count` threads (None: one for each processor this process may run on); returns the count.

    From then on torch itself stays on one thread in each of them. A GPU is driven from the caller's thread alone.
    """
    global _pool
    if _pool is not None:
        _pool.shutdown()
        _pool = None
    if device.type != "cpu":
        return 1
    count = count or processors()
    torch.set_num_threads(1)
    _pool = ThreadPoolExecutor(count, "torch", initializer=torch.set_num_threads, initargs=(1,)) if count > 1 else None
    return count


def processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has no affinity


def map_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of each item, in order, on the threads of `use_threads`; without them, one after the other.

    Each call runs with the gradient mode of the caller (torch keeps it per thread). It must not call `map_threads` itself.
    """
    if _pool is None:
        return map(function, items)
    wanted = torch.is_grad_enabled()

    def call(item: Item) -> Result:
        with torch.set_grad_enabled(wanted):
            return function(item)

    return _pool.map(call, items)
