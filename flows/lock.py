"""Single flight between processes: one works on a key, the others wait and then find it done.
A lock file with pid, host and heartbeat, so that a killed owner is noticed and its place taken over."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HEARTBEAT_S = 5.0
STALE_S = 60.0
"""An owner on another machine counts as dead after this long without a heartbeat: twelve missed beats."""


class LockLost(RuntimeError):
    """Somebody took the lock over while we held it; our result must not be recorded."""


def _process_started(pid: int) -> float | None:
    """Start time of a process, None when it is gone: tells a reused pid from the owner."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def read(path: Path) -> dict[str, Any] | None:
    """The owner's record with `age_s`, None when nobody holds the lock."""
    try:
        owner = json.loads(path.read_text())
        owner["age_s"] = time.time() - path.stat().st_mtime
        return owner
    except FileNotFoundError:
        return None
    except ValueError:  # torn by a power cut; nobody can be asked, so it is dead
        return {"host": "?", "pid": -1, "age_s": float("inf")}


def alive(owner: dict[str, Any]) -> bool:
    """Whether the owner still works: by its process on this host, by its heartbeat elsewhere."""
    if owner["host"] == socket.gethostname():
        started = _process_started(owner["pid"])
        return started is not None and abs(started - owner["process_started"]) < 2.0
    return owner["age_s"] < STALE_S


class Lock:
    """A held lock; its heartbeat runs in a thread until `release`."""

    def __init__(self, path: Path, token: str) -> None:
        self.path, self.token = path, token
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat {path.name}", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                os.utime(self.path)
            except OSError:
                return

    def check(self) -> None:
        """Raise LockLost unless this lock is still ours."""
        owner = read(self.path)
        if owner is None or owner.get("token") != self.token:
            raise LockLost(
                f"{self.path.name} was taken over by {owner and owner.get('host')}:{owner and owner.get('pid')}; result not recorded"
            )

    def release(self) -> None:
        self._stop.set()
        with _guard(self.path.parent):
            owner = read(self.path)
            if owner is not None and owner.get("token") == self.token:
                self.path.unlink(missing_ok=True)


@contextmanager
def _guard(folder: Path) -> Iterator[None]:
    """A short kernel lock around reading and replacing lock files, so that two waiters cannot both take a dead lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".guard", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def try_acquire(path: Path, **note: Any) -> Lock | None:
    """Take the lock now, from a dead owner too; None when a living process holds it. `note` is stored beside the pid."""
    with _guard(path.parent):
        owner = read(path)
        if owner is not None and alive(owner):
            return None
        token = uuid.uuid4().hex
        record = {
            **note,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "process_started": _process_started(os.getpid()),
            "since": time.time(),
            "token": token,
        }
        fresh = path.with_name(path.name + "." + token)
        fresh.write_text(json.dumps(record))
        os.replace(fresh, path)
        return Lock(path, token)
