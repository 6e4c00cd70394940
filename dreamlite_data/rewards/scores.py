"""What every scorer answers: its numbers, and for each row that has none the reason.
Reward models and further scorers end in the same way here, whatever they packed."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np


class Packed(Protocol):
    """B rows of which N were packed: which (`rows`, int64 [N]), their tokens (`n_tokens`, int64 [N]), and B `errors`."""

    rows: np.ndarray
    errors: tuple[str | None, ...]

    @property
    def n_tokens(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class RewardScores:
    """Scores of B rows. `heads` [B, H, 2] holds (mu, log sigma) of each head, `mu` and `log_sigma` their means over
    heads. Index 1 is a log standard deviation, never a quality. A row that could not be scored has NaN and a reason
    in `errors`, which is None elsewhere. `tokens` int64 [B] counts what ran through the network, 0 for such a row."""

    mu: np.ndarray
    log_sigma: np.ndarray
    heads: np.ndarray
    errors: tuple[str | None, ...]
    tokens: np.ndarray

    @classmethod
    def of(cls, packed: Packed, heads: np.ndarray, judged: slice = slice(None)) -> RewardScores:
        """The scores of packed rows from `heads` [B, H, 2], NaN where a row was not packed. Of each head the numbers `judged`
        must be finite, or the row is an error."""
        errors = list(packed.errors)
        for index in np.flatnonzero(~np.isfinite(heads[..., judged]).all((1, 2))):
            errors[index] = errors[index] or "the model returned a value that is not finite"
            heads[index] = np.nan
        mean = heads.mean(1)
        tokens = np.zeros(len(errors), np.int64)
        tokens[packed.rows] = packed.n_tokens
        tokens[np.isnan(mean[:, 0])] = 0
        return cls(mean[:, 0].copy(), mean[:, 1].copy(), heads, tuple(errors), tokens)
