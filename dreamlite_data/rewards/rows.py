"""Score the rows of a JSON Lines file with a reward model, a bounded batch at a time and in the file's order.
A line that cannot be read or scored becomes a row with its `error`."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dreamlite_data.rewards.model import RewardModel

FIELDS = {"hpsv3": ("image", "prompt"), "editreward": ("edited", "instruction", "source")}
"""Keys of a row by kind of reward: the image that is scored, the words, and for edits the image before."""

MAX_LINE_BYTES = 1_000_000
ROWS_PER_BATCH = 64


@dataclasses.dataclass(frozen=True)
class JsonLine:
    """One line of a file: its number, counted from 1, and its object, or why there is none."""

    number: int
    fields: dict[str, Any]
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class RewardInput:
    """What is scored together: image, words, and for an edit the image before it."""

    image: Path
    prompt: str
    source: Path | None


def read_json_lines(path: Path) -> Iterator[JsonLine]:
    """The objects of a JSON Lines file; blank lines are passed over, a longer line than MAX_LINE_BYTES is an error."""
    with path.open("rb") as opened:
        number = 0
        while line := opened.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                _skip_line(opened)
                yield JsonLine(number, {}, f"the line is longer than {MAX_LINE_BYTES:,} bytes")
            elif line.strip():
                yield _parsed(number, line)


def _skip_line(opened: BinaryIO) -> None:
    while (rest := opened.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
        pass


def _parsed(number: int, line: bytes) -> JsonLine:
    try:
        fields = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return JsonLine(number, {}, f"no valid JSON: {error}")
    if not isinstance(fields, dict):
        return JsonLine(number, {}, f"the line holds {type(fields).__name__}, not an object with keys")
    return JsonLine(number, fields)


def reward_input(fields: dict[str, Any], names: tuple[str, ...], folder: Path) -> RewardInput:
    """The images and words of a row under the keys `names` (image, words, and for edits source); paths are relative to
    `folder`. Raises ValueError that names the missing or wrong key."""
    for name in names:
        if name not in fields:
            raise ValueError(f"the key {name!r} is missing; needed are {', '.join(map(repr, names))}")
        if not isinstance(fields[name], str):
            raise ValueError(f"the value of {name!r} is {type(fields[name]).__name__}, not text")
    image, prompt, *source = (fields[name] for name in names)
    return RewardInput(folder / image, prompt, folder / source[0] if source else None)


def inputs_of_rows(path: Path, kind: str) -> Iterator[RewardInput]:
    """The rows of a file that can be read, without the others."""
    for line in read_json_lines(path):
        try:
            yield reward_input(line.fields, FIELDS[kind], path.parent)
        except ValueError:
            continue  # scoring says what is wrong with this row


def score_inputs(model: RewardModel, inputs: list[RewardInput]) -> list[dict[str, Any]]:
    """One dict per input: `mu`, `log_sigma`, with several heads also `<head>_mu` and `<head>_log_sigma`, and `tokens`;
    or `error` alone."""
    sources = [each.source for each in inputs] if model.spec.images == 2 else None
    scores = model.score([each.image for each in inputs], [each.prompt for each in inputs], sources)
    rows: list[dict[str, Any]] = []
    for index, error in enumerate(scores.errors):
        if error is not None:
            rows.append({"error": error})
            continue
        row: dict[str, Any] = {"mu": float(scores.mu[index]), "log_sigma": float(scores.log_sigma[index])}
        if len(model.head_names) > 1:
            for name, (mu, log_sigma) in zip(model.head_names, scores.heads[index].tolist(), strict=True):
                row |= {f"{name}_mu": mu, f"{name}_log_sigma": log_sigma}
        rows.append(row | {"tokens": int(scores.tokens[index])})
    return rows


def score_file(model: RewardModel, path: Path, rows_per_batch: int = ROWS_PER_BATCH) -> Iterator[dict[str, Any]]:
    """A dict for every row of the file, in its order: `row` (line number), `id` where the row has one, and what
    `score_inputs` says. At most `rows_per_batch` rows are in memory."""
    lines = read_json_lines(path)
    while batch := list(itertools.islice(lines, rows_per_batch)):
        yield from _score_lines(model, batch, path.parent)


def _score_lines(model: RewardModel, lines: list[JsonLine], folder: Path) -> Iterator[dict[str, Any]]:
    errors: dict[int, str] = {}
    inputs: dict[int, RewardInput] = {}
    for line in lines:
        if line.error:
            errors[line.number] = line.error
            continue
        try:
            inputs[line.number] = reward_input(line.fields, FIELDS[model.kind], folder)
        except ValueError as error:
            errors[line.number] = str(error)
    scored = dict(zip(inputs, score_inputs(model, list(inputs.values())), strict=True))
    for line in lines:
        own = {"row": line.number} | ({"id": line.fields["id"]} if "id" in line.fields else {})
        yield own | (scored[line.number] if line.number in scored else {"error": errors[line.number]})
