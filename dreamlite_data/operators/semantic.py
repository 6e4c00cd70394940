"""Group images that mean the same, by the cosine of their embeddings: k-means cells, and exact comparison within and across
their borders. The cells are fitted once per version and kept, so new rows meet the history cell by cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dreamlite_data import schema
from dreamlite_data.operators.grouping import NONE, Links, join_groups

FIT_ROWS = 65_536
FIT_SEED = 0
MAX_CELLS_PER_ROW = 4
BLOCK_ROWS = 2048
CELLS_AT_ONCE = 64
"""Cells whose history is in memory together: of a million rows in a thousand cells, 64 thousand vectors."""

KnownRows = Callable[[list[int]], pa.Table]
"""Rows of the history whose home is one of these cells: group_id, cluster and vector."""


class Semantic:
    """Runs on the driver over embeddings. `max_distance` is the largest 1 - cosine of two images that count as one (0.05 in
    SemDeDup, Abbas et al. 2023); `cells` is the number of k-means cells, 0 for the root of the number of rows at the fit."""

    name = "semantic"
    version = 1
    table = "op_semantic"

    def __init__(self, embed_version: str, max_distance: float, cells: int) -> None:
        self.embed_version, self.max_distance, self.cells = embed_version, max_distance, cells

    def config(self) -> dict[str, Any]:
        return {
            "embed": self.embed_version, "max_distance": self.max_distance, "cells": self.cells, "fit_rows": FIT_ROWS,
            "fit_seed": FIT_SEED, "max_cells_per_row": MAX_CELLS_PER_ROW,
        }  # fmt: skip

    def centroids(self, vectors: np.ndarray, path: Path) -> np.ndarray:
        """The cells of this version, float32 [K, D], from `path`, else fitted to unit `vectors` [N, D] and kept there."""
        if path.exists():
            return np.load(path, allow_pickle=False)
        from sklearn.cluster import MiniBatchKMeans
        from threadpoolctl import threadpool_limits

        sample = vectors[:FIT_ROWS]  # rows come sorted by a hash of their content: the first ones are a fair draw
        count = min(self.cells or max(1, round(len(vectors) ** 0.5)), len(sample))
        with threadpool_limits(1):  # sums in one order, whatever the machine
            found = MiniBatchKMeans(count, random_state=FIT_SEED, batch_size=4096, n_init=1).fit(sample).cluster_centers_.astype(np.float32)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp.npy")
        np.save(draft, found)
        draft.replace(path)
        return found

    def __call__(self, rows: pa.Table, centroids: np.ndarray, known_rows: KnownRows) -> pa.Table:
        """op_semantic rows for `rows` (subject_id, vector: unit length, or null where it could not be embedded)."""
        bad = rows["subject_id"].filter(pc.is_null(rows["vector"]))
        failed = pa.table({"subject_id": bad, "error": pa.array(["the image has no embedding"] * len(bad), pa.string())})
        good = rows.filter(pc.is_valid(rows["vector"])).sort_by("subject_id")
        found = self._group(good["subject_id"].combine_chunks(), unit_vectors(good["vector"]), centroids, known_rows)
        return pa.concat_tables([found, schema.conform(self.table, failed)]).sort_by("subject_id")

    def _group(self, ids: pa.Array, vectors: np.ndarray, centroids: np.ndarray, known_rows: KnownRows) -> pa.Table:
        home, guests = cells_of(vectors, centroids, self.max_distance)
        names, known, distance = self._nearest_known(vectors, guests, known_rows)
        found = join_groups(len(ids), self._links(vectors, home, guests), known, distance)
        founder = pa.array(np.where(found.opener < 0, 0, found.opener), mask=found.opener < 0)
        joined = pa.array(np.where(found.known < 0, 0, found.known), mask=found.known < 0)
        opened = found.opener == np.arange(len(ids))
        return schema.conform(self.table, pa.table({
            "subject_id": ids,
            "group_id": pc.coalesce(names.take(joined), ids.take(founder)),
            "kind": pa.array(np.where(opened, "first", "near").astype(object), pa.string()),
            "similarity": pa.array((1 - found.distance).astype(np.float32)),
            "cluster": pa.array(home.astype(np.int32)),
        }))  # fmt: skip

    def _links(self, vectors: np.ndarray, home: np.ndarray, guests: dict[int, np.ndarray]) -> Links:
        left, right, distance = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
        for cell, visitors in guests.items():
            members = np.flatnonzero(home == cell)
            for one, other, far in self._alike(vectors, visitors, vectors, members):
                once = (one < other) | (home[one] != cell)  # two members of a cell meet twice, a guest and a member once
                left.append(one[once])
                right.append(other[once])
                distance.append(far[once])
        return Links(np.concatenate(left), np.concatenate(right), np.concatenate(distance))

    def _nearest_known(
        self, vectors: np.ndarray, guests: dict[int, np.ndarray], known_rows: KnownRows
    ) -> tuple[pa.Array, np.ndarray, np.ndarray]:
        """Names of the groups that new rows meet, sorted; per row the number of the nearest one's (NONE) and its distance."""
        rows, groups, distances = [np.zeros(0, np.int64)], [], [np.zeros(0)]
        cells = list(guests)
        for start in range(0, len(cells), CELLS_AT_ONCE):
            history = known_rows(cells[start : start + CELLS_AT_ONCE])
            if not len(history):
                continue
            known_vectors, home = unit_vectors(history["vector"]), history["cluster"].to_numpy()
            for cell in np.unique(home).tolist():
                for one, other, far in self._alike(vectors, guests[cell], known_vectors, np.flatnonzero(home == cell)):
                    rows.append(one)
                    groups.append(history["group_id"].take(pa.array(other)).combine_chunks())
                    distances.append(far)
        met = pa.concat_arrays([pa.array([], pa.string()), *groups])
        names = pc.unique(met).sort()
        number, row, far = pc.index_in(met, value_set=names).to_numpy(), np.concatenate(rows), np.concatenate(distances)
        known, distance = np.full(len(vectors), NONE), np.zeros(len(vectors))
        order = np.lexsort((number, far, row))
        hit, first = np.unique(row[order], return_index=True)
        known[hit], distance[hit] = number[order[first]], far[order[first]]
        return names, known, distance

    def _alike(
        self, one: np.ndarray, rows: np.ndarray, other: np.ndarray, columns: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Pairs of `rows` of one and `columns` of other within the distance, block by block, and how far they are."""
        for top in range(0, len(rows), BLOCK_ROWS):
            for start in range(0, len(columns), BLOCK_ROWS):
                upper, side = rows[top : top + BLOCK_ROWS], columns[start : start + BLOCK_ROWS]
                far = 1 - one[upper] @ other[side].T
                i, j = np.nonzero(far <= self.max_distance)
                yield upper[i], side[j], np.maximum(0, far[i, j]).astype(np.float64)


def unit_vectors(column: pa.ChunkedArray) -> np.ndarray:
    """A list column as float32 [N, D] of length 1; a vector of zeros stays one and is like nothing."""
    column = column.combine_chunks()
    if not len(column):
        return np.zeros((0, 1), np.float32)
    flat = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return (flat / np.where(length > 0, length, 1)).astype(np.float32)


def cells_of(vectors: np.ndarray, centroids: np.ndarray, max_distance: float) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """The nearest cell of each row [N], and per cell the rows that must be compared with its members.

    Two unit vectors with 1 - cosine <= e are at most sqrt(2 e) apart. If one lies in cell a and the other in b, the first is
    at most that far from the plane between a and b; so whoever is compared with every cell whose plane is that near
    misses nobody. The nearest MAX_CELLS_PER_ROW of those are taken, which bounds the work where cells crowd.
    """
    home = np.zeros(len(vectors), np.int64)
    guests: dict[int, list[np.ndarray]] = {}
    apart = np.sqrt(np.maximum(0, ((centroids[:, None] - centroids[None]) ** 2).sum(2))) if len(centroids) <= 4096 else None
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = vectors[start : start + BLOCK_ROWS]
        square = (centroids**2).sum(1)[None] - 2 * block @ centroids.T  # the distance squared, less the row's own length
        nearest = np.argsort(square, axis=1, kind="stable")[:, :MAX_CELLS_PER_ROW]
        lines = np.arange(len(block))[:, None]
        own = nearest[:, :1]
        between = apart[own, nearest] if apart is not None else np.linalg.norm(centroids[own] - centroids[nearest], axis=2)
        margin = (square[lines, nearest] - square[lines, own]) / np.maximum(2 * between, 1e-12)
        probed = margin <= np.sqrt(2 * max_distance)
        home[start : start + len(block)] = own[:, 0]
        row, place = np.nonzero(probed)
        cell = nearest[row, place]
        for number in np.unique(cell):
            guests.setdefault(int(number), []).append(start + row[cell == number])
    return home, {cell: np.concatenate(parts) for cell, parts in sorted(guests.items())}
