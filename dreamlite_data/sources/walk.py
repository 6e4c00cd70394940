"""List the files below a folder in the order of their paths, however many there are.
Names of a large folder are sorted in portions on disk, so that a listing holds no more of a million files than of a thousand."""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import IO

Entry = tuple[str, bool]
"""Name of something in a folder, and whether it is a folder itself."""
PORTION_NAMES = 16_384
"""Names that are sorted at a time: some two megabytes."""


def files_below(root: Path, by_stem: bool = False, hidden: bool = False) -> Iterator[Path]:
    """Every file below `root` in the order of sorted paths. What begins with a dot is left out without `hidden`. A link to a file is
    listed, a link to a folder is not entered; nor is a folder that may not be read or is not there.

    With `by_stem` in the order of the paths without suffix: an image and its sidecars follow one another.
    """
    for name, is_folder in sorted_on_disk(_entries(root, hidden), _stem if by_stem else _name):
        path = root / name
        if is_folder:
            yield from files_below(path, by_stem, hidden)
        else:
            yield path


def folders_below(root: Path) -> Iterator[Path]:
    """`root` and every folder below it, hidden ones too, in the order of sorted paths."""
    yield root
    for name, _ in sorted_on_disk((entry for entry in _entries(root, hidden=True) if entry[1]), _name):
        yield from folders_below(root / name)


def sorted_on_disk(entries: Iterable[Entry], order: Callable[[Entry], tuple]) -> Iterator[Entry]:
    """`entries` sorted by `order`. Up to PORTION_NAMES of them are sorted in memory; of more, each sorted portion goes to a temporary
    file, and the files are merged."""
    with contextlib.ExitStack() as opened:
        parts: list[IO[str]] = []
        held: list[Entry] = []
        for entry in entries:
            if len(held) == PORTION_NAMES:
                parts.append(opened.enter_context(_written(sorted(held, key=order))))
                held = []
            held.append(entry)
        held.sort(key=order)
        yield from heapq.merge(*map(_read, parts), held, key=order) if parts else held


def _entries(folder: Path, hidden: bool) -> Iterator[Entry]:
    with contextlib.suppress(PermissionError, FileNotFoundError), os.scandir(folder) as found:
        for entry in found:
            if entry.name.startswith(".") and not hidden:
                continue
            with contextlib.suppress(OSError):  # a link that leads in a circle is no file
                if entry.is_dir(follow_symlinks=False):
                    yield entry.name, True
                elif entry.is_file():
                    yield entry.name, False


def _name(entry: Entry) -> Entry:
    return entry


def _stem(entry: Entry) -> tuple[str, bool, str]:
    """A file stands before what lies in the folder that has its stem for a name: its path without suffix is the shorter one."""
    name, is_folder = entry
    return (name, True, "") if is_folder else (PurePath(name).stem, False, name)


def _written(entries: list[Entry]) -> IO[str]:
    handle = tempfile.TemporaryFile("w+")
    handle.writelines(json.dumps(entry) + "\n" for entry in entries)  # in ASCII, for a name need not be text of any encoding
    handle.seek(0)
    return handle


def _read(handle: IO[str]) -> Iterator[Entry]:
    for line in handle:
        name, is_folder = json.loads(line)
        yield name, is_folder
