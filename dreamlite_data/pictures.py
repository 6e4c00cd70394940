"""Pictures that a model made, one PNG per call, so that a killed run makes none of them twice.
The folder is bounded: what was not used for longest goes first, for it can be made again."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from dreamlite_data.responses import Call, write_whole

DRAFT_AGE_S = 3600.0
"""A half-written file older than this has no writer any more."""


class Pictures:
    """The kept pictures below one folder, at most `limit_mb` after each `trim`. A file is named by the picture that went in
    and the key of the call, so that a takedown of the former finds it. Any number of processes may read, write and trim."""

    def __init__(self, root: Path | str, limit_mb: int) -> None:
        self.root = Path(root)
        self.limit_bytes = limit_mb * 2**20

    def find(self, call: Call) -> bytes | None:
        """The PNG that `call` made; None where it must be made (or was torn by a power cut)."""
        path = self._path(call)
        try:
            payload = path.read_bytes()
        except FileNotFoundError:
            return None
        if not payload.endswith(b"IEND\xaeB`\x82"):
            return None
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)  # used now: trimming takes others first
        return payload

    def keep(self, call: Call, payload: bytes) -> None:
        """Store a PNG; it appears whole or not at all."""
        write_whole(self._path(call), payload)

    def trim(self) -> int:
        """Delete the pictures that were not used for longest until the rest fits, and drafts that nobody finishes. Returns how many."""
        found, gone = [], 0
        for path in self.root.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):  # another process trims as well
                state = path.stat()
                if path.suffix == ".tmp":
                    if time.time() - state.st_mtime > DRAFT_AGE_S:
                        path.unlink()
                        gone += 1
                else:
                    found.append((state.st_mtime_ns, path, state.st_size))
        held = sum(size for _, _, size in found)
        for _, path, size in sorted(found):
            if held <= self.limit_bytes:
                break
            path.unlink(missing_ok=True)
            held -= size
            gone += 1
        return gone

    def _path(self, call: Call) -> Path:
        key = call.key()
        return self.root / key[:2] / f"{'.'.join(call.inputs)}.{key}.png"


def pictures_folder(lake_files: Path) -> Path:
    """Where a lake whose `files/` this is keeps the pictures that models made."""
    return lake_files / "cache" / "pictures"
