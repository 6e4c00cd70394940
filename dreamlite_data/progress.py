"""One progress bar for every long loop: a live line on a terminal, a plain line every few seconds elsewhere.
It exists so that operators, trainers and flows tell how far they are, how fast and how long still, in one voice."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from types import TracebackType

PLAIN_INTERVAL_S = 5.0
"""Seconds between two plain lines: often enough to see life, rare enough for a log file."""


def _clock(seconds: float) -> str:
    seconds = max(0, int(seconds))
    if seconds >= 3600:
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return f"{seconds // 60}:{seconds % 60:02d}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Progress:
    """Count work done and show it.

    >>> with Progress("embed", total=100, unit="rows") as bar:
    ...     bar.advance(10, loss=0.5)

    `total=None` means the end is not known: no percentage and no ETA. `done` is what an earlier run finished: it counts in
    the percentage, not in the rate. Silent when DREAMLITE_PROGRESS=0.
    A bar inside a bar on a terminal prints plain lines, and so does one of a worker process: only one live line can own the screen.
    """

    _live_owner: Progress | None = None

    def __init__(self, label: str, total: int | None = None, unit: str = "rows", done: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._before = done
        self.metrics: dict[str, float | str] = {}
        self._started = self._printed = time.monotonic()
        self._bar = None
        self._task = None

    @staticmethod
    def quiet() -> bool:
        """True when the environment switched progress off (DREAMLITE_PROGRESS=0)."""
        return os.environ.get("DREAMLITE_PROGRESS", "1").lower() in {"0", "false", "no", "off"}

    def __enter__(self) -> Progress:
        self._started = self._printed = time.monotonic()
        alone = Progress._live_owner is None and multiprocessing.parent_process() is None
        if not self.quiet() and sys.stderr.isatty() and alone:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as RichBar

            self._bar = RichBar(
                TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[tail]}"),
                console=Console(stderr=True), transient=True,
            )
            self._task = self._bar.add_task(self.label, total=self.total, tail="")
            self._bar.start()
            Progress._live_owner = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            Progress._live_owner = None
        if not self.quiet():
            verb = "stopped at" if kind else "done"
            self._print(f"{self.label}: {verb} {self.describe()} in {_clock(time.monotonic() - self._started)}")

    def advance(self, n: int = 1, **metrics: float | str) -> None:
        """Add `n` units of finished work; keyword arguments are shown beside the rate."""
        self.update(self.done + n, **metrics)

    def update(self, done: int, **metrics: float | str) -> None:
        """Set the finished work to `done` units (for loops that know their own position)."""
        self.done = done
        self.metrics.update(metrics)
        if self.quiet():
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=done, tail=self.describe())
            return
        now = time.monotonic()
        if now - self._printed >= PLAIN_INTERVAL_S:
            self._printed = now
            self._print(f"{self.label}: {self.describe()}")

    def describe(self) -> str:
        """The line's text: '120/400 rows 30% 24/s eta 0:12 loss=0.31'."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (self.done - self._before) / seconds
        parts = [f"{self.done:,}/{self.total:,} {self.unit}" if self.total else f"{self.done:,} {self.unit}"]
        if self.total:
            parts.append(f"{100 * self.done / self.total:.0f}%")
        parts.append(f"{_number(rate)}/s")
        if self.total and rate > 0 and self.done < self.total:
            parts.append(f"eta {_clock((self.total - self.done) / rate)}")
        parts += [f"{name}={_number(value) if isinstance(value, (int, float)) else value}" for name, value in self.metrics.items()]
        return " ".join(parts)

    @staticmethod
    def _print(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
