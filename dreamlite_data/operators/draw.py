"""Draws that depend on ids alone: the same image gets the same choices on any machine, in any order of work.
Nothing in the data engine may draw otherwise, or executors would not agree byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def draw_bits(*parts: object) -> int:
    """64 bits out of the parts' texts."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "big")


def pick(choices: Sequence[T], *parts: object) -> T:
    """One of `choices`, uniformly."""
    return choices[draw_bits("pick", *parts) % len(choices)]


def shuffled(items: Sequence[T], *parts: object) -> list[T]:
    """`items` in an order of the parts' own."""
    return [items[index] for index in sorted(range(len(items)), key=lambda index: draw_bits("order", index, *parts))]


def generator(*parts: object) -> np.random.Generator:
    """A numpy generator for many draws."""
    return np.random.default_rng(draw_bits("generator", *parts))
