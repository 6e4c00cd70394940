"""Grades of answers to the held-out questions: which pictures are exactly right, and what is wrong with the others.
Free of torch: training stages and bundles are graded by the same code."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from dreamlite_data import scenes
from dreamlite_data.shares import Share
from trainers.questions import Questions

Row = dict[str, object]


@dataclasses.dataclass(frozen=True)
class Grades:
    """`right`: whether each picture shows exactly what was asked, in the order of the pictures. `parts`: the verdicts of
    `scene_agreement` or `edit_agreement`, together for all pictures."""

    task: str
    right: list[bool]
    groups: list[str]
    parts: dict[str, list[bool]]
    repetitions: int

    def rows(self, prefix: str = "") -> list[Row]:
        """(task, metric, value, n, low, high): the exact rate, by group of questions, and the rate of each part."""
        name = f"{prefix}{self.task}_exact"
        rows = [rate_row(self.task, name, self.right, self.repetitions)]
        if prefix:
            return rows
        grouped = defaultdict(list)
        for group, value in zip(self.groups, self.right, strict=True):
            grouped[group].append(value)
        rows += [rate_row(self.task, f"{name}_{group}", values, self.repetitions) for group, values in sorted(grouped.items())]
        return rows + [rate_row(self.task, f"{self.task}_part_{part}", values, self.repetitions) for part, values in self.parts.items() if values]


def grade_generated(images: np.ndarray, questions: Questions) -> Grades:
    """Grade pictures [R * N, H, W, 3]: R repetitions of the N prompts, one after the other."""
    repetitions = len(images) // len(questions.wanted)
    asked = questions.wanted * repetitions
    right = [scenes.matches(image, scene) for image, scene in zip(images, asked, strict=True)]
    parts = _together(scenes.scene_agreement(image, scene) for image, scene in zip(images, asked, strict=True))
    return Grades("generate", right, [f"{len(scene.objects)}_objects" for scene in asked], parts, repetitions)


def grade_edited(images: np.ndarray, questions: Questions) -> Grades:
    """Grade answers [R * N, H, W, 3] to R repetitions of the N edits, one after the other."""
    repetitions = len(images) // len(questions.targets)
    triples = list(zip(questions.sources * repetitions, images, questions.targets * repetitions, strict=True))
    right = [scenes.edit_matches(*triple) for triple in triples]
    return Grades("edit", right, questions.kinds * repetitions, _together(scenes.edit_agreement(*triple) for triple in triples), repetitions)


def rate_row(task: str, metric: str, verdicts: Sequence[bool], repetitions: int = 1) -> Row:
    """A rate with its 95 % Wilson interval. Pictures of one question succeed and fail together, so the interval counts
    questions, not pictures: with several `repetitions` it is wider than need be, never narrower."""
    questions = max(1, round(len(verdicts) / repetitions))
    low, high = Share(round(float(np.mean(verdicts)) * questions), questions).interval or (None, None)
    return {"task": task, "metric": metric, "value": float(np.mean(verdicts)), "n": len(verdicts), "low": low, "high": high}


def mean_row(task: str, metric: str, values: Sequence[float]) -> Row:
    """A mean of anything but verdicts."""
    return {"task": task, "metric": metric, "value": float(np.mean(values)), "n": len(values), "low": None, "high": None}


def _together(found: Iterable[dict[str, list[bool]]]) -> dict[str, list[bool]]:
    parts: dict[str, list[bool]] = defaultdict(list)
    for verdicts in found:
        for part, values in verdicts.items():
            parts[part] += values
    return dict(parts)
