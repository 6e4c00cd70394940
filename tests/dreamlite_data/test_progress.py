"""A line of progress says how much is done, how fast, and how long the rest takes."""

from __future__ import annotations

from dreamlite_data import progress
from dreamlite_data.progress import Progress


def test_work_of_an_earlier_run_counts_as_done_but_not_as_speed(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("t2i", total=350, unit="steps", done=80) as bar:
        now[0] += 10
        assert bar.describe() == "80/350 steps 23% 0/s"  # nothing done yet, so no estimate
        bar.advance(20)
        assert bar.describe() == "100/350 steps 29% 2/s eta 2:05"


def test_without_an_end_there_is_no_share_and_no_estimate() -> None:
    bar = Progress("read", unit="rows")
    bar.advance(3, loss=0.5)
    text = bar.describe()
    assert text.startswith("3 rows") and "%" not in text and "eta" not in text and text.endswith("loss=0.5")
