"""What the tools of an export say while they work: they talk to their own developers, and here only trouble matters.
A level of one logger, or that with all warnings off, for the length of a block."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def log_level(level: int, logger: str = "") -> Iterator[None]:
    """Let `logger`, by its name ('' is the root), tell only what is at `level` or above."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)


@contextlib.contextmanager
def quiet(logger: str = "") -> Iterator[None]:
    """Only errors from `logger`, and no warnings."""
    with log_level(logging.ERROR, logger), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
