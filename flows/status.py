"""What the lake knows about runs, put into rows a person reads: newest runs, their steps, what runs now.
Reads only; a run whose process is gone is shown as crashed without waiting for the next run to say so."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from dreamlite_data.lake import Lake
from flows import lock
from flows.run import running_steps


@dataclass
class Overview:
    """Rows of `dreamlite status`."""

    runs: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    now: list[str]


def overview(lake: Lake, count: int = 5) -> Overview:
    """The newest `count` runs, the steps of the newest of them, and a line for each step being computed."""
    runs = lake.query(
        "SELECT r.run_id, r.preset, r.state, r.started_at, r.ended_at, count(s.step) FILTER (s.state = 'done') AS done, "
        "count(s.step) FILTER (s.state = 'skipped') AS skipped, count(s.step) FILTER (s.state IN ('failed', 'stopped')) AS failed "
        "FROM runs r LEFT JOIN steps s USING (run_id) GROUP BY ALL ORDER BY r.started_at DESC LIMIT ?",
        [count],
    ).to_pylist()
    rows = [{
        "run": row["run_id"], "preset": row["preset"], "state": _state(lake, row), "started": _time(row["started_at"]),
        "took": _took(row["started_at"], row["ended_at"]), "done": row["done"], "skipped": row["skipped"], "failed": row["failed"],
    } for row in runs]  # fmt: skip
    steps = (
        lake.query(
            "SELECT step, state, seconds, key, json_extract_string(outputs_json, '$.error') AS error FROM steps "
            "WHERE run_id = ? ORDER BY ended_at, step",
            [runs[0]["run_id"]],
        ).to_pylist()
        if runs
        else []
    )
    return Overview(
        rows,
        [{"step": row["step"], "state": row["state"], "seconds": f"{row['seconds']:.1f}", "key": row["key"][:12], "error": row["error"] or ""}
         for row in steps],
        [f"now: {owner['step']} for {time.time() - owner['since']:.0f} s, process {owner['pid']} on {owner['host']} (run {owner['run_id']})"
         for owner in running_steps(lake)],
    )  # fmt: skip


def _state(lake: Lake, row: dict[str, Any]) -> str:
    if row["state"] != "running":
        return row["state"]
    owner = lock.read(lake.root / "locks" / f"run-{row['run_id']}.lock")
    return "running" if owner is not None and lock.alive(owner) else "crashed"


def _time(moment: datetime | None) -> str:
    return moment.strftime("%Y-%m-%d %H:%M:%S") if moment else ""


def _took(start: datetime | None, end: datetime | None) -> str:
    return f"{(end - start).total_seconds():.1f} s" if start and end else ""
