"""Which rows make up which batch: exact task counts, one panel shape a batch, and a list of shapes of about one area.
A pure function of seed and step, so that a resumed run and any number of processes see the same batches."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
from diffusers.training_utils import generate_aspect_ratio_buckets

from dreamlite_data.dataset import DatasetError

BUCKET_MULTIPLE_PX = 32
"""Latents are 1/8 of a side and the UNet halves twice: sides divisible by 32 pass both without padding."""

Panel = tuple[int, int]
"""(height, width) of one panel in pixels."""


def bucket_panels(size_px: int) -> list[Panel]:
    """Shapes with about size_px x size_px pixels, the square first, then from 4:5 to 1:2 both ways (diffusers' ladder)."""
    return generate_aspect_ratio_buckets(size_px, divisibility=BUCKET_MULTIPLE_PX)


def nearest_panel(width: int, height: int, panels: Sequence[Panel]) -> Panel:
    """The panel whose ratio of sides is nearest to that of an image, as a factor."""
    return min(panels, key=lambda panel: abs(math.log(panel[0] * width / (panel[1] * height))))


def crop_box(width: int, height: int, panel: Panel) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the largest centred part of an image with the shape of a panel."""
    scale = min(width / panel[1], height / panel[0])
    wide, high = min(width, round(panel[1] * scale)), min(height, round(panel[0] * scale))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


class Plan:
    """Batches of rows. `pools[panel][task]` are the indices of the rows that may share a batch; a keyed permutation an epoch
    decides their order in each pool, and a keyed permutation of shapes a cycle which of them a step draws from.

    A cycle holds as many batches of a shape as its fullest task fills. Rows of a shape in which some task cannot fill one
    batch are left out: `lost` counts them by (panel, task), and no other row is ever lost. Raises ValueError where the batch
    cannot hold the shares exactly, DatasetError where no shape has enough rows.
    """

    def __init__(self, pools: dict[Panel, dict[str, list[int]]], tasks: dict[str, float], batch: int, key: tuple[int, ...]) -> None:
        self.batch, self.key = batch, key
        counts = {task: int(round(share * batch)) for task, share in tasks.items()}
        if sum(counts.values()) != batch or any(count / batch != tasks[task] for task, count in counts.items()):
            raise ValueError(f"a batch of {batch} cannot hold the task shares {tasks} exactly: change `batch`")
        self.counts = {task: count for task, count in counts.items() if count}
        for task in self.counts:
            if not any(pool.get(task) for pool in pools.values()):
                raise DatasetError(f"the stage trains on {task!r} rows, but its datasets hold none: check `datasets` and `tasks`")
        alone = len(pools) == 1  # one shape may repeat rows within a batch: a small dataset still trains
        self.pools = {panel: pool for panel, pool in sorted(pools.items()) if alone or self._fills_a_batch(pool)}
        self.lost = {
            (panel, task): len(pool[task]) for panel, pool in sorted(pools.items()) if panel not in self.pools for task in self.counts if pool.get(task)
        }
        if not self.pools:
            fullest = ", ".join(f"{width}x{height} ({count})" for ((height, width), _), count in sorted(self.lost.items(), key=lambda item: -item[1])[:3])
            raise DatasetError(
                f"no aspect bucket has the {', '.join(f'{count} {task}' for task, count in self.counts.items())} rows that a batch takes;"
                f" the fullest are {fullest}: lower `batch`, add rows or set model.aspect_buckets to false"
            )
        if self.lost:
            shapes = ", ".join(f"{width}x{height} ({count} {task})" for ((height, width), task), count in sorted(self.lost.items()))
            print(f"{sum(self.lost.values())} rows have shapes too rare to fill a batch and are left out: {shapes}", file=sys.stderr)
        self._cycle = [panel for panel, pool in self.pools.items() for _ in range(self._batches(pool))]
        self._orders: dict[tuple[object, ...], np.ndarray] = {}

    def indices(self, step: int) -> tuple[list[int], list[int]]:
        """(row indices, global sample positions) of batch `step`."""
        panel, visit = self._visit(step)
        chosen: list[int] = []
        for number, (task, count) in enumerate(self.counts.items()):
            pool = self.pools[panel][task]
            for position in range(visit * count, (visit + 1) * count):
                epoch, place = divmod(position, len(pool))
                chosen.append(pool[self._order(panel, number, epoch, len(pool))[place]])
        return chosen, list(range(step * self.batch, (step + 1) * self.batch))

    def _fills_a_batch(self, pool: dict[str, list[int]]) -> bool:
        return all(len(pool.get(task, ())) >= count for task, count in self.counts.items())

    def _batches(self, pool: dict[str, list[int]]) -> int:
        return max(1, *(len(pool[task]) // count for task, count in self.counts.items()))

    def _visit(self, step: int) -> tuple[Panel, int]:
        """(the shape of batch `step`, how many batches of that shape came before it)."""
        cycle, place = divmod(step, len(self._cycle))
        if len(self.pools) == 1:
            return self._cycle[0], step
        order = self._permutation(("shapes", cycle), (*self.key, 1 << 20, cycle), len(self._cycle))
        panel = self._cycle[order[place]]
        before = sum(self._cycle[index] == panel for index in order[:place])
        return panel, cycle * self._cycle.count(panel) + before

    def _order(self, panel: Panel, number: int, epoch: int, size: int) -> np.ndarray:
        shape = panel if len(self.pools) > 1 else ()
        return self._permutation((panel, number, epoch), (*self.key, number, epoch, *shape), size)

    def _permutation(self, name: tuple[object, ...], seed: tuple[int, ...], size: int) -> np.ndarray:
        """Kept until a later one of the same name is drawn: epochs only ever go forward, by at most one within a batch."""
        if name not in self._orders:
            self._orders = {other: order for other, order in self._orders.items() if other[:-1] != name[:-1] or other[-1] >= name[-1] - 1}
            self._orders[name] = np.random.default_rng(seed).permutation(size)
        return self._orders[name]
