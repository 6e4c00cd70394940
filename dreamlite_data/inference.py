"""Run a network inside a worker: with the threads that the worker has, and without progress bars on the way in.
A sum over other threads is another last bit, so the number must not depend on which process happens to compute."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def worker_threads() -> Iterator[None]:
    """Give torch OMP_NUM_THREADS threads (1 where that is not set) and transformers silence, and put both back after."""
    import torch
    from transformers.utils import logging

    threads, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1") or 1))
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            logging.enable_progress_bar()
