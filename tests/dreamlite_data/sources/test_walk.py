"""A walk that sorts on disk gives the order of sorted paths, and holds no more of many files than of few."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dreamlite_data.sources import walk
from dreamlite_data.sources.base import DigestCache, hidden
from dreamlite_data.sources.folder import SIDECAR_SUFFIXES, FolderSource
from dreamlite_data.sources.walk import files_below, folders_below

PARTS = ("a", "b", "a.b", "a.b.c", "A", "10", "9", "\u00e9", "z ", ".hidden", "a.", "_a")
SUFFIXES = ("", ".jpg", ".JPG", ".png", ".txt", ".json", ".caption", ".jpg.txt")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files whose names are prefixes of one another and of folders, hidden ones, links, and a name that is no UTF-8."""
    root, draw = tmp_path / "root", np.random.default_rng(0)
    for _ in range(150):
        folder = root.joinpath(*draw.choice(PARTS, draw.integers(0, 3)))
        file = folder / f"{draw.choice(PARTS)}{draw.choice(SUFFIXES)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(str(file))
        except OSError:
            continue  # the name is taken by a file, or by a folder
    (root / os.fsdecode(b"caf\xe9.png")).write_text("no UTF-8")
    (root / "inside.png").symlink_to(root / "inside_target.png")
    (root / "inside_target.png").write_text("there")
    (root / "outside.png").symlink_to("/etc/hostname")
    (root / "folder_link").symlink_to(root / "b", target_is_directory=True)
    (root / "dangling.png").symlink_to(root / "nothing")
    (root / "circle.png").symlink_to(root / "circle.png")
    return root


@pytest.fixture(params=[3, 16_384])
def portion(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(walk, "PORTION_NAMES", request.param)
    return request.param


def test_files_come_in_the_order_of_sorted_paths(tree: Path, portion: int) -> None:
    every = sorted(file for file in tree.rglob("*") if file.is_file())
    visible = [file for file in every if not hidden(file.relative_to(tree))]
    assert list(files_below(tree)) == visible and len(visible) > 60
    assert list(files_below(tree, hidden=True)) == every != visible
    stems = [file.with_suffix("") for file in files_below(tree, by_stem=True)]
    assert stems == sorted(stems) != [file.with_suffix("") for file in visible]  # another order than that of names
    assert sorted(files_below(tree, by_stem=True)) == visible
    assert list(folders_below(tree)) == sorted([tree, *(path for path in tree.rglob("*") if path.is_dir() and not path.is_symlink())])


def test_a_folder_source_lists_what_one_that_holds_everything_would(tree: Path, portion: int, tmp_path: Path) -> None:
    root = tree.resolve()
    files = sorted(file for file in root.rglob("*") if file.is_file() and not hidden(file.relative_to(root)))
    groups: dict[Path, list[Path]] = {}
    for file in files:
        if file.resolve().is_relative_to(root):
            groups.setdefault(file.with_suffix(""), []).append(file)
    expected = []
    for _, group in sorted(groups.items()):
        beside = [file for file in group if file.suffix.lower() in SIDECAR_SUFFIXES]
        expected += [(str(file), tuple(map(str, beside))) for file in [file for file in group if file not in beside] or beside[:1]]
    units = list(FolderSource("own", tree).units(DigestCache(tmp_path / "digests.sqlite")))
    assert [(unit.path, unit.sidecars) for unit in units] == expected
    assert len({unit.digest for unit in units}) > 40 and any(len(unit.sidecars) > 1 for unit in units)
    assert not any("outside" in unit.shard or "folder_link" in unit.shard for unit in units)


def test_listing_holds_no_more_of_many_files_than_of_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "PORTION_NAMES", 64)
    monkeypatch.setattr("dreamlite_data.sources.digests.WRITTEN_AT_ONCE", 64)
    peaks = []
    for count in (200, 2000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            (folder / f"{number:06d}.jpg").touch()
        tracemalloc.start()
        assert sum(1 for _ in FolderSource("own", folder).units(DigestCache(tmp_path / f"{count}.sqlite"))) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 2**17, peaks  # open portions take a few hundred bytes each
