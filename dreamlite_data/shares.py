"""A share of what was counted with its 95 % Wilson interval, as verification and reward evaluation report it.
Small counts are common there, and a bare rate would look surer than it is."""

from __future__ import annotations

import dataclasses

from scipy import stats

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Share:
    """`hits` of `total`; of nothing there is neither value nor interval."""

    hits: int
    total: int

    @property
    def value(self) -> float | None:
        """hits / total."""
        return self.hits / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Low and high end of the Wilson interval."""
        if not self.total:
            return None
        found = stats.binomtest(self.hits, self.total).proportion_ci(CONFIDENCE, method="wilson")
        return float(found.low), float(found.high)

    def columns(self, name: str) -> dict[str, float | None]:
        """The value under `name`, the ends of the interval under `name`_low and `name`_high."""
        low, high = self.interval or (None, None)
        return {name: self.value, f"{name}_low": low, f"{name}_high": high}
