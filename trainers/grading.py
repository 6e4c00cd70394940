"""Grades of answers to the held-out questions: which pictures are exactly right, and what is wrong with the others.
Free of torch: training stages and bundles are graded by the same code."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from dreamlite_data import scenes
from dreamlite_data.shares import Share
from trainers.questions import Questions

Row = dict[str, object]


@dataclasses.dataclass(frozen=True)
class Grades:
    """`verdicts`: what `scene_agreement` or `edit_agreement` says of each picture. One that agrees in every part shows exactly
    what was asked: `scenes.matches` and `scenes.edit_matches` would read it a second time to say the same."""

    task: str
    groups: list[str]
    verdicts: list[dict[str, list[bool]]]
    repetitions: int
    texts: list[str]
    draw: str

    @property
    def right(self) -> list[bool]:
        """Whether each picture shows exactly what was asked."""
        return [all(all(values) for values in parts.values()) for parts in self.verdicts]

    def rows(self, prefix: str = "") -> list[Row]:
        """(task, metric, value, n, low, high): the exact rate, by group of questions, and the rate of each part."""
        name, right = f"{prefix}{self.task}_exact", self.right
        rows = [rate_row(self.task, name, right, self.repetitions)]
        if prefix:
            return rows
        grouped = defaultdict(list)
        for group, value in zip(self.groups, right, strict=True):
            grouped[group].append(value)
        rows += [rate_row(self.task, f"{name}_{group}", values, self.repetitions) for group, values in sorted(grouped.items())]
        together: dict[str, list[bool]] = defaultdict(list)
        for parts in self.verdicts:
            for part, values in parts.items():
                together[part] += values
        return rows + [rate_row(self.task, f"{self.task}_part_{part}", values, self.repetitions) for part, values in together.items() if values]

    def answers(self, rewards: Sequence[float] | None = None) -> list[Row]:
        """A row of the lake's eval_answers for each picture, with its reward where there are `rewards`."""
        count = len(self.texts)
        return [
            {
                "task": self.task, "question_id": f"{self.draw}-{index % count}", "repetition": index // count, "kind": self.groups[index],
                "text": self.texts[index % count], "exact": right, "wrong": [part for part, values in parts.items() if not all(values)],
                "reward": None if rewards is None else float(rewards[index]),
            }
            for index, (parts, right) in enumerate(zip(self.verdicts, self.right, strict=True))
        ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """`scores`: rows of the lake's evals, a metric each. `answers`: rows of its eval_answers, a picture each."""

    scores: list[Row]
    answers: list[Row]


def grade_generated(images: np.ndarray, questions: Questions) -> Grades:
    """Grade pictures [R * N, H, W, 3]: R repetitions of the N prompts, one after the other."""
    repetitions = len(images) // len(questions.wanted)
    asked = questions.wanted * repetitions
    verdicts = [scenes.scene_agreement(image, scene) for image, scene in zip(images, asked, strict=True)]
    groups = [f"{len(scene.objects)}_objects" for scene in asked]
    return Grades("generate", groups, verdicts, repetitions, questions.prompts, questions.name)


def grade_edited(images: np.ndarray, questions: Questions) -> Grades:
    """Grade answers [R * N, H, W, 3] to R repetitions of the N edits, one after the other."""
    repetitions = len(images) // len(questions.targets)
    triples = zip(questions.sources * repetitions, images, questions.targets * repetitions, strict=True)
    verdicts = [scenes.edit_agreement(*triple) for triple in triples]
    return Grades("edit", questions.kinds * repetitions, verdicts, repetitions, questions.instructions, questions.name)


def rate_row(task: str, metric: str, verdicts: Sequence[bool], repetitions: int = 1) -> Row:
    """A rate with its 95 % Wilson interval. Pictures of one question succeed and fail together, so the interval counts
    questions, not pictures: with several `repetitions` it is wider than need be, never narrower."""
    questions = max(1, round(len(verdicts) / repetitions))
    low, high = Share(round(float(np.mean(verdicts)) * questions), questions).interval or (None, None)
    return {"task": task, "metric": metric, "value": float(np.mean(verdicts)), "n": len(verdicts), "low": low, "high": high}


def mean_row(task: str, metric: str, values: Sequence[float]) -> Row:
    """A mean of anything but verdicts."""
    return {"task": task, "metric": metric, "value": float(np.mean(values)), "n": len(values), "low": None, "high": None}
