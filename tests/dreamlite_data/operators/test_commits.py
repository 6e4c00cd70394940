"""Results that are committed together leave the lake as if each had been committed alone, and none is lost to an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dreamlite_data import schema
from dreamlite_data.lake import Lake
from dreamlite_data.operators import commits as module
from dreamlite_data.operators.base import Written, write_table
from dreamlite_data.operators.commits import Commits, commit

READ = {
    "images": "SELECT image_id, bytes FROM images ORDER BY ALL", "captions": "SELECT caption_id, text FROM captions ORDER BY ALL",
    "op_quality": "SELECT subject_id, op_version, sharpness FROM op_quality ORDER BY ALL",
}  # fmt: skip


def results(lake: Lake, count: int = 6) -> list[Written]:
    """What so many workers wrote: six rows each, of which many come again in other results, told otherwise."""
    rng, written = np.random.default_rng(0), []
    for number in range(count):
        ids = [f"{drawn:02}" for drawn in rng.permutation(20)[:6]]
        tables = {
            "images": [{"image_id": name, "bytes": f"{name} of {number}".encode()} for name in ids],
            "captions": [{"caption_id": name, "text": f"{name} of {number}"} for name in ids],
            "op_quality": [{"subject_id": name, "op_version": f"v{number % 2}", "sharpness": float(number)} for name in ids],
        }
        files = {name: write_table(name, schema.rows_table(name, rows), lake.staging, f"{number}") for name, rows in tables.items()}
        written.append(Written(files, 6, 0))
    return written


def contents(lake: Lake) -> dict[str, list[dict]]:
    return {name: lake.query(sql).to_pylist() for name, sql in READ.items()}


def together(lake: Lake, found: list[Written]) -> None:
    commit(lake, found[:1])
    commit(lake, found[1:])


def held(lake: Lake, found: list[Written]) -> None:
    with Commits(lake) as commits:
        for written in found:
            commits.add(written)


@pytest.mark.parametrize("way", [together, held])
def test_results_in_one_commit_are_the_same_rows_as_one_by_one(way: Callable[[Lake, list[Written]], None], tmp_path: Path) -> None:
    with Lake(tmp_path / "alone") as alone, Lake(tmp_path / "together") as lake:
        for written in results(alone):
            commit(alone, [written])
        way(lake, results(lake))
        assert contents(lake) == contents(alone)
        known = [row["image_id"] for row in contents(lake)["images"]]
        assert len(known) == len(set(known)) < 36 and not list(lake.staging.iterdir())
        assert lake.snapshot() < alone.snapshot()
        before = lake.snapshot()
        commit(lake, results(lake))  # all of it again brings nothing new
        assert lake.snapshot() == before and contents(lake) == contents(alone) and not list(lake.staging.iterdir())


def test_a_slow_commit_is_followed_by_a_rest_and_an_error_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, groups = [100.0], []

    def slow(lake: Lake, given: list[Written], withdraw: tuple = ()) -> None:
        groups.append(len(given))
        now[0] += 1.0

    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "commit", slow)
    any_result = Written({}, 1, 0)
    with pytest.raises(RuntimeError), Commits(None) as commits:
        for _ in range(30):
            commits.add(any_result)
            now[0] += 2.0
        raise RuntimeError("a worker died")
    assert groups == [1, 5, 5, 5, 5, 5, 4]  # the first at once, then one in ten seconds, and at the end what is left
    with Commits(None) as commits:
        commits.add(any_result)
        commits.add(any_result)
        commits.add(any_result, [("source", "shard")])
    assert groups[-3:] == [1, 1, 1]  # what replaces earlier records waits for those before it and goes alone
