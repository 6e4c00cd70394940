"""How well a reward model agrees with people on pairs: accuracy without ties and with them, for every head.
With ties, a threshold on the difference of scores says when the model calls a tie (arXiv 2305.14324)."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dreamlite_data.rewards.model import RewardModel
from dreamlite_data.rewards.rows import ROWS_PER_BATCH, JsonLine, RewardInput, read_json_lines, reward_input, score_inputs
from dreamlite_data.shares import Share

SIDE_FIELDS = {
    "hpsv3": (("image_a", "prompt"), ("image_b", "prompt")),
    "editreward": (("edited_a", "instruction", "source"), ("edited_b", "instruction", "source")),
}
"""Keys of both sides of a pair: image, words, and for edits the image before."""

LABEL_FIELD = "preferred"
LABELS = {"a": 1, "b": -1, "tie": 0}


class PairsError(ValueError):
    """Pairs or labels that cannot be evaluated; the message says which and how to mend them."""


@dataclasses.dataclass
class ScoredPairs:
    """What was read and scored. `labels` 1 (a is better), 0 (tie), -1, and `differences` of mu (a minus b) by judge:
    'score' and, with several heads, each head. `errors` are (line, why) of the pairs that are left out."""

    labels: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    differences: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    folds: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    errors: list[tuple[int, str]] = dataclasses.field(default_factory=list)


def score_pairs(model: RewardModel, path: Path, label_field: str = LABEL_FIELD, labels_path: Path | None = None) -> ScoredPairs:
    """Score both sides of every pair of a JSON Lines file.

    What people prefer stands in the pair under `label_field` ('a', 'b' or 'tie') and, where a head was judged on its
    own, under `<label_field>_<head>`; or under the same keys in `labels_path`, whose lines are found by `id`. Raises
    PairsError where the labels' file cannot be used; a pair that cannot is left out with its reason.
    """
    lookup = _labels_by_id(labels_path) if labels_path else None
    found = ScoredPairs()
    lines = read_json_lines(path)
    while batch := list(itertools.islice(lines, ROWS_PER_BATCH // 2)):
        _score_batch(model, batch, path.parent, label_field, lookup, found)
    return found


def inputs_of_pairs(path: Path, kind: str) -> Iterator[RewardInput]:
    """Both sides of the pairs of a file that can be read, without the others."""
    for line in read_json_lines(path):
        try:
            yield from [reward_input(line.fields, names, path.parent) for names in SIDE_FIELDS[kind]]
        except ValueError:
            continue  # evaluation says what is wrong with this pair


def _labels_by_id(path: Path) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for line in read_json_lines(path):
        if line.error:
            raise PairsError(f"{path}, line {line.number}: {line.error}")
        if not isinstance(line.fields.get("id"), str | int):
            raise PairsError(f"{path}, line {line.number}: no 'id' (text or a whole number) that says which pair it labels")
        if line.fields["id"] in found:
            raise PairsError(f"{path}, line {line.number}: the id {line.fields['id']!r} has a label already; keep one a pair")
        found[line.fields["id"]] = line.fields
    return found


def _score_batch(
    model: RewardModel, lines: list[JsonLine], folder: Path, label_field: str,
    lookup: dict[Any, dict[str, Any]] | None, found: ScoredPairs,
) -> None:  # fmt: skip
    judges = {"score": ("mu", label_field)}
    if len(model.head_names) > 1:
        judges |= {head: (f"{head}_mu", f"{label_field}_{head}") for head in model.head_names}
    ready: list[tuple[JsonLine, dict[str, int]]] = []
    inputs: list[RewardInput] = []
    for line in lines:
        try:
            if line.error:
                raise ValueError(line.error)
            labelled = line.fields if lookup is None else _own_labels(line.fields, lookup)
            labels = _labels(labelled, label_field, [field for _, field in judges.values()])
            sides = [reward_input(line.fields, names, folder) for names in SIDE_FIELDS[model.kind]]
        except ValueError as error:
            found.errors.append((line.number, str(error)))
            continue
        ready.append((line, labels))
        inputs += sides
    scored = score_inputs(model, inputs)
    for (line, labels), first, second in zip(ready, scored[0::2], scored[1::2], strict=True):
        errors = [f"side {side}: {row['error']}" for side, row in (("a", first), ("b", second)) if "error" in row]
        if errors:
            found.errors.append((line.number, "; ".join(errors)))
            continue
        for judge, (score, field) in judges.items():
            if field in labels:
                found.labels.setdefault(judge, []).append(labels[field])
                found.differences.setdefault(judge, []).append(first[score] - second[score])
                found.folds.setdefault(judge, []).append(_fold(line.number))


def _own_labels(pair: dict[str, Any], lookup: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    name = pair.get("id")
    if not isinstance(name, str | int):
        raise ValueError("no 'id' (text or a whole number), by which its label would be found")
    if name not in lookup:
        raise ValueError(f"the labels' file has no line with the id {name!r}")
    return lookup[name]


def _labels(fields: dict[str, Any], overall: str, names: list[str]) -> dict[str, int]:
    """Labels by key. A head without a label of its own is held against the overall one."""
    found = {}
    for name in names:
        value = fields.get(name, fields.get(overall))
        if value is None:
            continue
        label = LABELS.get(value.lower()) if isinstance(value, str) else None
        if label is None:
            raise ValueError(f"the label {value!r} is not 'a', 'b' or 'tie'")
        found[name] = label
    if not found:
        raise ValueError(f"no label under the key {overall!r}")
    return found


def _fold(number: int) -> int:
    """Half of the pairs, by a hash, so that it does not depend on what was sorted how."""
    return hashlib.sha256(str(number).encode()).digest()[0] % 2


# -- accuracy


@dataclasses.dataclass(frozen=True)
class PairAccuracy:
    """Agreement with people. `without_ties` is over pairs in which they saw a difference, equal scores being wrong.
    `with_ties` is over all pairs, the model calling a tie where scores differ by at most `threshold`, the one that is
    best for these very pairs and so flatters; `held_out` takes each half's threshold from the other half."""

    pairs: int
    ties: int
    without_ties: Share
    with_ties: Share
    threshold: float
    held_out: Share


def pair_accuracy(labels: list[int], differences: list[float], folds: list[int]) -> PairAccuracy:
    """Accuracy of score differences (a minus b) against labels (1: a, 0: tie, -1: b). Raises PairsError without pairs."""
    human, model, fold = np.asarray(labels), np.asarray(differences, np.float64), np.asarray(folds)
    if not len(human):
        raise PairsError("no pair could be scored")
    threshold = tie_threshold(human, model)
    clear = human != 0
    held_out = sum(
        _agreeing(human[fold == half], model[fold == half], tie_threshold(human[fold != half], model[fold != half]))
        for half in (0, 1)
    )
    total = len(human) if 0 < fold.sum() < len(fold) else 0
    return PairAccuracy(
        len(human), int((~clear).sum()), Share(int((human * model > 0).sum()), int(clear.sum())),
        Share(_agreeing(human, model, threshold), len(human)), threshold, Share(held_out if total else 0, total),
    )  # fmt: skip


def tie_threshold(human: np.ndarray, model: np.ndarray) -> float:
    """The smallest threshold, out of 0 and every |difference|, with which most pairs are judged as people did.

    Tie calibration of Deutsch et al. (arXiv 2305.14324, section 5). With the pairs in order of |difference|, raising
    the threshold past one turns it into a tie: right if people saw one, and no longer right if it was ranked right.
    """
    size = np.abs(model)
    order = np.argsort(size, kind="stable")
    gain = np.where(human == 0, 1, -(human * model > 0).astype(int))[order]
    agreeing = np.concatenate([[0], np.cumsum(gain)])
    values = np.concatenate([[0.0], size[order]])
    last = np.append(values[1:] != values[:-1], True)  # equal differences become ties together
    return float(values[last][np.argmax(agreeing[last])])


def _agreeing(human: np.ndarray, model: np.ndarray, threshold: float) -> int:
    called = np.where(np.abs(model) <= threshold, 0, np.sign(model))
    return int((called == human).sum())


def accuracy_rows(scored: ScoredPairs) -> list[dict[str, Any]]:
    """A row for each judge ('score', and the heads): counts, shares and intervals. Raises PairsError without pairs."""
    if not scored.labels:
        first = f": line {scored.errors[0][0]}: {scored.errors[0][1]}" if scored.errors else ""
        raise PairsError(f"no pair could be scored{first}")
    return [_as_row(judge, pair_accuracy(scored.labels[judge], scored.differences[judge], scored.folds[judge])) for judge in scored.labels]


def _as_row(judge: str, found: PairAccuracy) -> dict[str, Any]:
    row: dict[str, Any] = {"judge": judge, "pairs": found.pairs, "ties": found.ties}
    for name, share in (("without_ties", found.without_ties), ("with_ties", found.with_ties), ("with_ties_held_out", found.held_out)):
        row |= share.columns(name)
    return row | {"tie_threshold": found.threshold}
