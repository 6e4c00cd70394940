"""An operator in two stages: `prepare` on CPUs (decode, resize, tokenize), `infer` where the model is.
Where a GPU is asked for, Ray runs them in two pools, and only packed arrays reach the model's; elsewhere they run as one."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import pyarrow as pa

from dreamlite_data.operators.base import Operator, Task, Written, inputs_of, written


class StagedOperator(Operator, Protocol):
    """`infer(prepare(rows))` is `__call__(rows)`. What `prepare` gives holds plain arrays and no image file."""

    def prepare(self, rows: pa.Table) -> Any: ...

    def infer(self, prepared: Any) -> pa.Table: ...


@dataclasses.dataclass(frozen=True)
class PreparedTask:
    """A task whose images were read and packed; `rows` are its narrow inputs."""

    task: Task
    rows: pa.Table
    prepared: Any


def prepare_task(task: Task) -> PreparedTask:
    """First stage, runs on a CPU worker."""
    operator = task.make()
    prepared = operator.prepare(inputs_of(task, operator))
    return PreparedTask(dataclasses.replace(task, places={}), task.rows, prepared)


def infer_task(prepared: PreparedTask) -> Written:
    """Second stage, runs where the model is; writes the rows as `run_task` does."""
    operator = prepared.task.make()
    return written(prepared.task, operator, prepared.rows, operator.infer(prepared.prepared))
