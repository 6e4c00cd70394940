"""Remember the sha256 of files by path, size and modification time, so that a nightly listing reads no content twice.
On disk, for a source may have more files than a process has memory."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

WRITTEN_AT_ONCE = 4096
WAIT_S = 10.0


def file_digests(lake_files: Path) -> DigestCache:
    """The digests that a lake whose `files/` this is remembers: of what sources, benchmarks and models consist of."""
    return DigestCache(lake_files / "sources" / "digests.sqlite")


class DigestCache:
    """sha256 of files, remembered in the SQLite file at `path`. A lost or torn cache costs one reading of the files, never a wrong
    answer; one that another process holds for long remembers less."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new: dict[bytes, tuple[int, int, str]] = {}
        self._connection: sqlite3.Connection | None = None

    def digest(self, path: Path) -> str:
        """sha256 of the file at `path` in hex."""
        facts = path.stat()
        key = os.fsencode(path)
        seen = self._new.get(key) or self._remembered(key)
        if seen and seen[:2] == (facts.st_size, facts.st_mtime_ns):
            return seen[2]
        with path.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        self._new[key] = (facts.st_size, facts.st_mtime_ns, found)
        if len(self._new) >= WRITTEN_AT_ONCE:
            self._write()
        return found

    def of_files(self, root: Path, files: Iterable[Path]) -> str:
        """sha256 in hex over the names below `root` and the contents of `files`, in their order."""
        total = hashlib.sha256()
        for file in files:
            total.update(f"{file.relative_to(root)}={self.digest(file)}\n".encode())
        return total.hexdigest()

    def save(self) -> None:
        """Write what was added, and let go of the file."""
        self._write()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _remembered(self, key: bytes) -> tuple[int, int, str] | None:
        if self._connection is None and not self._path.exists():
            return None
        question = "SELECT size_bytes, changed_ns, sha256 FROM digests WHERE path = ?"
        return self._ask(lambda connection: connection.execute(question, (key,)).fetchone())

    def _write(self) -> None:
        rows = [(path, *facts) for path, facts in sorted(self._new.items())]
        self._new = {}

        def write(connection: sqlite3.Connection) -> None:
            with connection:  # one transaction
                connection.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?)", rows)

        if rows:
            self._ask(write)

    def _ask(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """What `work` answers; None where SQLite cannot do it now. A file that is no database is thrown away."""
        try:
            if self._connection is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._connection = sqlite3.connect(self._path, timeout=WAIT_S)
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS digests "
                    "(path BLOB PRIMARY KEY, size_bytes INTEGER, changed_ns INTEGER, sha256 TEXT) WITHOUT ROWID"
                )
            return work(self._connection)
        except sqlite3.OperationalError:  # held by somebody else, or on a disk that is full
            return None
        except sqlite3.DatabaseError:
            self._connection.close()
            self._connection = None
            self._path.unlink(missing_ok=True)
            return None
