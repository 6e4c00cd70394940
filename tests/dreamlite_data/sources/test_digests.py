"""Digests are remembered on disk; a torn, locked or strange file costs a reading, never a wrong answer."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from pathlib import Path

import pytest

from dreamlite_data.sources import digests
from dreamlite_data.sources.base import DigestCache


def _files(folder: Path, count: int = 10) -> dict[Path, str]:
    names = [os.fsdecode(b"caf\xe9.png"), *(f"{number}.png" for number in range(count - 1))]
    for name in names:
        (folder / name).write_bytes(os.fsencode(name))
    return {folder / name: hashlib.sha256(os.fsencode(name)).hexdigest() for name in names}


def test_what_was_saved_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "WRITTEN_AT_ONCE", 4)
    files = _files(tmp_path)
    cache = DigestCache(tmp_path / "cache" / "digests.sqlite")
    assert {file: cache.digest(file) for file in files} == files
    cache.save()
    monkeypatch.setattr("hashlib.file_digest", None)
    again = DigestCache(tmp_path / "cache" / "digests.sqlite")
    assert {file: again.digest(file) for file in files} == files
    with pytest.raises(TypeError):
        DigestCache(tmp_path / "other.sqlite").digest(next(iter(files)))  # the control: nothing remembered, so it must read


@pytest.mark.parametrize("content", [b"{}", b"SQLite format 3\0" + b"\xff" * 5000, b""])
def test_a_file_that_is_no_database_is_replaced(tmp_path: Path, content: bytes) -> None:
    path, files = tmp_path / "digests.sqlite", _files(tmp_path)
    path.write_bytes(content)
    cache = DigestCache(path)
    assert {file: cache.digest(file) for file in files} == files
    cache.save()
    assert sqlite3.connect(path).execute("SELECT count(*) FROM digests").fetchone() == (len(files),)


def test_a_cache_that_somebody_holds_remembers_less_and_answers_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "WAIT_S", 0.01)
    path, files = tmp_path / "digests.sqlite", _files(tmp_path)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    cache = DigestCache(path)
    assert {file: cache.digest(file) for file in files} == files
    cache.save()
    holder.execute("COMMIT")
    assert {file: DigestCache(path).digest(file) for file in files} == files
