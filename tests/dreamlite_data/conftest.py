"""One small lake for every test that only reads, and the means to compare two lakes row by row."""

from __future__ import annotations

from pathlib import Path

import pytest

from dreamlite_data import executors, refresh, schema
from dreamlite_data.lake import Lake
from dreamlite_data.settings import RefreshSettings

SMALL = {
    "scenes": {"t2i_rows": 120, "edit_rows": 80, "shard_rows": 40, "fault_share": 0.2},
    "photos": {"max_px": 96, "edits_per_image": 1},
}
MEASURED = [name for name in schema.TABLES if name in {**schema.CONTENT, **schema.OPERATORS, **schema.DATASETS}]


def small_settings(**changes: object) -> RefreshSettings:
    """200 rows, a fifth of them broken, and the photos at thumbnail size."""
    return RefreshSettings(**{**SMALL, **changes})


def build(lake: Lake, settings: RefreshSettings, executor: executors.Executor | None = None, seed: int = 0) -> list[dict]:
    """The whole refresh without scores; returns the dataset versions."""
    executor = executor or executors.local()
    refresh.write_sources(lake, settings, seed)
    refresh.ingest(lake, settings, executor)
    for names in (["quality"], ["edit", "caption"], ["verify"]):
        refresh.measure(lake, settings, executor, names)
    return refresh.curate(lake, settings, seed)


def contents(lake: Lake, tables: list[str] = MEASURED) -> dict[str, list]:
    """Every row of every table in one order. `datasets.snapshot` counts commits, which may differ."""
    answer = {}
    for name in tables:
        columns = "* EXCLUDE (snapshot)" if name == "datasets" else "*"
        answer[name] = lake.query(f"SELECT {columns} FROM {name} ORDER BY ALL").to_pylist()
    return answer


@pytest.fixture(scope="session")
def settings() -> RefreshSettings:
    return small_settings(executor="local", workers=1)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, settings: RefreshSettings) -> Lake:
    """A refreshed lake. Tests may read it and may run a refresh that has nothing to do, but must not change it."""
    lake = Lake(tmp_path_factory.mktemp("built"))
    build(lake, settings)
    return lake


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """An empty lake."""
    return Lake(tmp_path / "lake")
