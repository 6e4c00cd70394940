"""Semantic groups: what brute force finds is found, history counts, and a row without a vector is a row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dreamlite_data import executors, refresh
from dreamlite_data.lake import Lake
from dreamlite_data.operators.semantic import Semantic, cells_of, unit_vectors
from dreamlite_data.settings import RefreshSettings

WIDTH = 48


def _vectors(rng: np.random.Generator, topics: int, each: int, spread: float = 0.8) -> np.ndarray:
    """Topics of loosely alike unit vectors; of every second one there is a near copy (cosine about 0.98)."""
    centres = rng.normal(size=(topics, WIDTH))
    loose = (centres[:, None] + spread * rng.normal(size=(topics, each, WIDTH))).reshape(-1, WIDTH)
    copies = loose[::2] + 0.2 * np.linalg.norm(loose[::2], axis=1, keepdims=True) * rng.normal(size=(len(loose[::2]), WIDTH)) / WIDTH**0.5
    found = np.concatenate([loose, copies])
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def _rows(vectors: np.ndarray, prefix: str = "") -> pa.Table:
    ids = [f"{prefix}{number:05d}" for number in range(len(vectors))]
    return pa.table({"subject_id": ids, "vector": pa.array(list(vectors), pa.list_(pa.float32()))})


def test_pairs_of_brute_force_are_found(tmp_path: Path) -> None:
    vectors = _vectors(np.random.default_rng(0), 30, 60, spread=2.0)  # topics run into one another
    operator = Semantic("embed-1", 0.05, 60)
    centroids = operator.centroids(vectors, tmp_path / "cells.npy")
    home, guests = cells_of(vectors, centroids, operator.max_distance)
    links = operator._links(vectors, home, guests)
    far = 1 - vectors @ vectors.T
    expected = {(i, j) for i, j in zip(*np.nonzero(np.triu(far <= 0.05, 1)), strict=True)}
    found = {(min(i, j), max(i, j)) for i, j in zip(links.left.tolist(), links.right.tolist(), strict=True)}
    assert len(expected) >= 800 and found <= expected
    assert len(found) / len(expected) >= 0.999
    within_home = {(i, j) for i, j in expected if home[i] == home[j]}
    assert len(within_home) < len(expected)  # looking into one cell only would have missed some


def test_new_rows_join_groups_of_the_history() -> None:
    vectors = _vectors(np.random.default_rng(1), 5, 8)
    operator = Semantic("embed-1", 0.05, 1)
    centroids = vectors.mean(0, keepdims=True)
    first = operator(_rows(vectors[:40], "z"), centroids, lambda cells: pa.table({"group_id": pa.array([], pa.string())}))
    history = pa.table({"group_id": first["group_id"], "cluster": first["cluster"], "vector": _rows(vectors[:40])["vector"]})
    later = operator(_rows(vectors[40:]), centroids, lambda cells: history).to_pylist()
    group = dict(zip(first["subject_id"].to_pylist(), first["group_id"].to_pylist(), strict=True))
    assert [row["group_id"] for row in later] == [group[f"z{2 * number:05d}"] for number in range(20)]
    assert all(row["kind"] == "near" and row["similarity"] > 0.95 for row in later)


def test_a_row_without_a_vector_is_a_row_with_an_error() -> None:
    rows = pa.table({"subject_id": ["b", "a"], "vector": pa.array([None, [1.0, 0.0]], pa.list_(pa.float32()))})
    answer = Semantic("embed-1", 0.05, 1)(rows, np.ones((1, 2), np.float32), lambda cells: pa.table({"group_id": []})).to_pylist()
    assert [(row["subject_id"], row["kind"], bool(row["error"])) for row in answer] == [("a", "first", False), ("b", None, True)]
    assert unit_vectors(pa.chunked_array([pa.array([[0.0, 0.0]], pa.list_(pa.float32()))])).tolist() == [[0.0, 0.0]]


def _embedded(lake: Lake, ids: list[str], vectors: np.ndarray) -> None:
    lake.append({
        "images": [{"image_id": name, "bytes": b"x", "width": 1, "height": 1} for name in ids],
        "op_embed": [{"subject_id": name, "op_version": "e", "vector": vector.tolist()} for name, vector in zip(ids, vectors, strict=True)],
    })  # fmt: skip


def test_semantic_groups_in_a_lake_grow_night_by_night(lake: Lake) -> None:
    settings = RefreshSettings(semantic={"enabled": True})
    with pytest.raises(LookupError, match="run the measurement 'embed' first"):
        refresh.measure(lake, settings, executors.local(), ["semantic"])
    vectors = _vectors(np.random.default_rng(2), 10, 6)
    lake.append({"operator_versions": [{"name": "embed", "op_version": "e", "config_json": "{}", "position": 0}]})
    _embedded(lake, [f"m{number:03d}" for number in range(60)], vectors[:60])
    assert refresh.measure(lake, settings, executors.local(), ["semantic"])["semantic_rows"] == 60
    _embedded(lake, [f"a{number:03d}" for number in range(30)], vectors[60:])
    assert refresh.measure(lake, settings, executors.local(), ["semantic"])["semantic_rows"] == 30
    groups = {row["subject_id"]: row["group_id"] for row in lake.query("SELECT subject_id, group_id FROM current_semantic").to_pylist()}
    assert [groups[f"a{number:03d}"] for number in range(30)] == [groups[f"m{2 * number:03d}"] for number in range(30)]
    snapshot = lake.snapshot()
    assert refresh.measure(lake, settings, executors.local(), ["semantic"])["semantic_rows"] == 0 and lake.snapshot() == snapshot
