"""Read the rules of verification (verify_rules.yaml) and judge a triplet's measures by them.
Every condition ends as passed, failed, not applicable, or not evaluated; the last is counted and never taken for a pass."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from importlib import resources
from typing import Any

import yaml

from dreamlite_data.operators.verify_measures import Measures
from dreamlite_data.taxonomy import EditType, load_taxonomy

FALLBACK = "any"


class RuleError(ValueError):
    """verify_rules.yaml does not say what it must; the message names the entry."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """`low` <= measure <= `high`. A `required` one that cannot be evaluated leaves the whole triplet undecided; others are
    only noted as not evaluated."""

    measure: str
    low: float = -math.inf
    high: float = math.inf
    required: bool = False

    def failure(self, value: float) -> str | None:
        """How `value` breaks the condition: "outside_fraction 0.3100 > 0.0200"; None where it holds."""
        if value < self.low:
            return f"{self.measure} {value:.4f} < {self.low:.4f}"
        if value > self.high:
            return f"{self.measure} {value:.4f} > {self.high:.4f}"
        return None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`verdict` is 'pass', 'fail' or 'not_evaluated'; `failed` says what broke and by what value, `not_evaluated` names the
    measures that were not available."""

    rule: str
    verdict: str
    failed: tuple[str, ...]
    not_evaluated: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """The file, read: conditions by rule name, a rule name being level1/level2, level1, or 'any'."""

    digest: str
    conditions: dict[str, tuple[Condition, ...]]

    def name_for(self, kind: EditType) -> str:
        """The most particular rule that there is for a type."""
        return next((name for name in (str(kind), kind.level1) if name in self.conditions), FALLBACK)

    def measures(self, kind: EditType) -> frozenset[str]:
        """What the rule of a type reads."""
        return frozenset(condition.measure for condition in self.conditions[self.name_for(kind)])

    def reads_digest(self) -> str:
        """Names which measures each rule reads: another threshold is another judgement of the same measures."""
        reads = {name: sorted({condition.measure for condition in conditions}) for name, conditions in sorted(self.conditions.items())}
        return hashlib.sha256(repr(reads).encode()).hexdigest()[:12]

    def reading(self, measure: str) -> list[str]:
        """Names of the rules that read `measure`."""
        return sorted(name for name, conditions in self.conditions.items() if any(one.measure == measure for one in conditions))

    def judge(self, kind: EditType, measures: Measures) -> Verdict:
        """Hold the conditions of `kind` against `measures`: a missing or null measure is not evaluated, NaN not applicable."""
        name = self.name_for(kind)
        failed, absent, undecided = [], [], False
        for condition in self.conditions[name]:
            value = measures.get(condition.measure)
            if value is None:
                absent.append(condition.measure)
                undecided |= condition.required
            elif not math.isnan(value) and (failure := condition.failure(value)) is not None:
                failed.append(failure)
        verdict = "fail" if failed else "not_evaluated" if undecided else "pass"
        return Verdict(name, verdict, tuple(failed), tuple(absent))


@functools.cache
def load_rules() -> Rules:
    """The packaged rules. Raises RuleError."""
    return read_rules(resources.files("dreamlite_data.operators").joinpath("verify_rules.yaml").read_text(encoding="utf-8"))


def read_rules(text: str) -> Rules:
    """Read and check rules: names are types of the taxonomy, every rule has a required condition, bounds are in order."""
    data = yaml.safe_load(text)
    taxonomy = load_taxonomy()
    conditions: dict[str, tuple[Condition, ...]] = {}
    for name, entries in data["rules"].items():
        level1, _, level2 = name.partition("/")
        if name != FALLBACK and not (level1 in taxonomy.levels and (not level2 or level2 in taxonomy.levels[level1])):
            raise RuleError(f"verify_rules.yaml: {name!r} is no type of taxonomy.yaml")
        conditions[name] = tuple(_condition(name, entry, data["sets"]) for entry in _flat(name, entries, data["sets"]))
        if not any(condition.required for condition in conditions[name]):
            raise RuleError(f"verify_rules.yaml: {name} has no required condition, so a triplet could pass with nothing evaluated")
    if FALLBACK not in conditions:
        raise RuleError(f"verify_rules.yaml has no rule {FALLBACK!r} for types without one of their own")
    return Rules(hashlib.sha256(text.encode()).hexdigest()[:12], conditions)


def _flat(name: str, entries: list[Any], sets: dict[str, list[dict]]) -> list[dict]:
    flat: list[dict] = []
    for entry in entries:
        if isinstance(entry, str):
            if entry not in sets:
                raise RuleError(f"verify_rules.yaml: {name} uses the set {entry!r}; there are {', '.join(sets)}")
            flat += sets[entry]
        else:
            flat.append(entry)
    return flat


def _condition(name: str, entry: dict[str, Any], sets: dict[str, list[dict]]) -> Condition:
    unknown = set(entry) - {"measure", "min", "max", "required"}
    low, high = float(entry.get("min", -math.inf)), float(entry.get("max", math.inf))
    if unknown or "measure" not in entry or not low <= high or (low, high) == (-math.inf, math.inf):
        raise RuleError(f"verify_rules.yaml: {name} has the condition {entry}; it wants measure, min and/or max in order, required")
    return Condition(entry["measure"], low, high, bool(entry.get("required", False)))
