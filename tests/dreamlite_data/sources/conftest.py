"""An empty lake for each test, copied from one that is made once: making the tables takes longer than most of these tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dreamlite_data.lake import Lake


@pytest.fixture(scope="session")
def empty_lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an empty lake. Copy it, do not open it."""
    root = tmp_path_factory.mktemp("empty") / "lake"
    Lake(root).close()
    return root


@pytest.fixture
def lake(empty_lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """An empty lake, in no folder that a test writes to."""
    root = tmp_path_factory.mktemp("lake") / "lake"
    shutil.copytree(empty_lake, root)
    return Lake(root)
