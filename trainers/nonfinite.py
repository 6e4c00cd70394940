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


def require_finite(
    value: torch.Tensor,
    gradients: Sequence[torch.Tensor | None],
    part: Batch,
    parameters: Sequence[nn.Parameter],
    loss: Callable[[Batch], tuple[torch.Tensor, dict[str, Any]]],
) -> None:
    """Raise NonFiniteError unless the loss `value` of a micro-batch and its gradients are finite.

    Its rows are then tried one by one: the error names those that fail alone, or all of them where each is well by itself.
    """
    what = _broken(value, gradients)
    if what is None:
        return
    guilty = []
    for row in part.split(1) if len(part.rows) > 1 else []:
        alone, _ = loss(row)
        if _broken(alone, torch.autograd.grad(alone, parameters, allow_unused=True)):
            guilty += row.rows
    raise NonFiniteError(what, guilty or part.rows)


def _broken(value: torch.Tensor, gradients: Sequence[torch.Tensor | None]) -> str | None:
    if not torch.isfinite(value.detach()).all():
        return "the loss"
    norms = torch._foreach_norm([gradient for gradient in gradients if gradient is not None])
    return None if torch.isfinite(torch.stack(norms)).all() else "the gradient"


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
