"""A real, empty lake per test, copied from one that is made once: creating the tables is the slow part."""

import shutil
from pathlib import Path

import pytest

from dreamlite_data.lake import Lake


@pytest.fixture(scope="session")
def lake_template(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("template") / "lake"
    Lake(root).close()
    return root


@pytest.fixture
def lake(lake_template, tmp_path) -> Lake:
    shutil.copytree(lake_template, tmp_path / "lake")
    with Lake(tmp_path / "lake") as opened:
        yield opened
