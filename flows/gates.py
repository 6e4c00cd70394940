"""Promotion gates between stages: a checkpoint that lost too much goes no further.
A gate is not part of any key: moving a threshold re-runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flows.step import StepRecord


class GateFailed(RuntimeError):
    """A gate did not hold; the message holds the numbers. Everything computed so far stays and is not redone."""

    is_gate = True


class Gate(BaseModel):
    """One condition on the metric of an evaluation step, or of the export, looked at right after that step.

    after: the step ('evaluate_dmd2', 'export').   metric: 'task/metric' as in its metrics ('generate/exact').
    min, max: the value may not be below, or above, this.   max_drop: it may not lie more than this below the same metric of `compared_to`.
    """

    model_config = ConfigDict(extra="forbid")

    after: str
    metric: str
    min: float | None = None
    max: float | None = None
    compared_to: str | None = None
    max_drop: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _complete(self) -> Gate:
        if (self.compared_to is None) != (self.max_drop is None):
            raise ValueError("a gate that compares needs both 'compared_to' (an earlier evaluation step) and 'max_drop'")
        if self.min is None and self.max is None and self.max_drop is None:
            raise ValueError("a gate needs 'min', 'max', or 'compared_to' with 'max_drop'")
        return self


def check_gates(
    gates: Sequence[Gate], step: str, records: Mapping[str, StepRecord], say: Callable[[str], None] = lambda line: None
) -> None:
    """Check every gate that stands after `step`; raises GateFailed with the numbers of all that fail."""
    failures = []
    for gate in gates:
        if gate.after != step:
            continue
        value = _metric(records, step, gate.metric)
        if gate.min is not None and not value >= gate.min:
            failures.append(f"{gate.metric} after {step} is {value:.4f}, the gate asks for at least {gate.min:g}")
        if gate.max is not None and not value <= gate.max:
            failures.append(f"{gate.metric} after {step} is {value:.4f}, the gate allows at most {gate.max:g}")
        if gate.compared_to is not None and gate.max_drop is not None:
            before = _metric(records, gate.compared_to, gate.metric)
            if not before - value <= gate.max_drop:
                failures.append(
                    f"{gate.metric} fell from {before:.4f} ({gate.compared_to}) to {value:.4f} ({step}), "
                    f"a loss of {before - value:.4f}; the gate allows {gate.max_drop:g}"
                )
    if failures:
        raise GateFailed("gate failed: " + "; ".join(failures) + ". Improve the stage, or loosen 'gates' in the config, and run again.")
    if any(gate.after == step for gate in gates):
        say(f"  gates after {step} hold")


def _metric(records: Mapping[str, StepRecord], step: str, metric: str) -> float:
    if step not in records:
        raise GateFailed(f"gate on '{metric}' compares with step '{step}', which is not part of this run")
    metrics = records[step].metrics
    if metric not in metrics:
        raise GateFailed(f"gate wants metric '{metric}' of step '{step}', which reports {sorted(metrics)}")
    return float(metrics[metric])
