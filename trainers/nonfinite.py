"""A loss or gradient that is not finite stops a run before any weight takes it, and the rows behind it are kept in a file.
No value is ever replaced: a training that hides a NaN has learned from something else."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainers.data import Batch, Row
from trainers.distributed import world

ROWS_FILE = "offending_rows.json"


class NonFiniteError(FloatingPointError):
    """Rows whose loss or gradient is NaN or infinite."""

    def __init__(self, what: str, rows: Sequence[Row]) -> None:
        super().__init__(what)
        self.rows = list(rows)


def are_finite(value: torch.Tensor, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """[2]: whether the loss `value` of a micro-batch is finite, and whether its gradients are. Left on their device, unread."""
    norms = torch._foreach_norm([gradient for gradient in gradients if gradient is not None])
    return torch.stack([torch.isfinite(value.detach()).all(), torch.isfinite(torch.stack(norms)).all()])


def broken_rows(
    finite: Sequence[bool],
    part: Batch,
    parameters: Sequence[nn.Parameter],
    loss: Callable[[Batch], tuple[torch.Tensor, dict[str, Any]]],
) -> NonFiniteError:
    """The error of a micro-batch that `are_finite` found broken. Its rows are tried one by one: those that fail alone are named,
    or all of them where each is well by itself. Of several processes none tries: a sharded reward would wait for the others."""
    guilty = []
    for row in part.split(1) if len(part.rows) > 1 and world().size == 1 else []:
        alone, _ = loss(row)
        if not are_finite(alone, torch.autograd.grad(alone, parameters, allow_unused=True)).all():
            guilty += row.rows
    return NonFiniteError("the gradient" if finite[0] else "the loss", guilty or part.rows)


def stop(error: NonFiniteError, label: str, step: int, output: Path) -> FloatingPointError:
    """Write the rows to output/offending_rows.json (of each process its own) and return the error that ends the run."""
    here = world()
    path = output / (ROWS_FILE if here.first else ROWS_FILE.replace(".json", f".{here.rank}.json"))
    rows = [
        {"row_id": row.row_id, "task": row.task, "image_id": row.image_id, "source_image_id": row.source_image_id, "text": row.text}
        for row in error.rows
    ]
    path.write_text(json.dumps({"step": step, "not_finite": str(error), "rows": rows}, indent=2))
    named = ", ".join(row.row_id for row in error.rows[:3]) + (", ..." if len(error.rows) > 3 else "")
    return FloatingPointError(
        f"{label}: {error} of {len(error.rows)} rows is not finite at step {step} ({named}); they are listed in {path}. The last"
        " checkpoint is as it was: lower the learning rate, or take the rows out if they fail on their own"
    )
