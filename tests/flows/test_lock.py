"""One process holds a key; a killed or silent owner is replaced, a living one is not."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows import lock

HOLD = "import sys, time; from pathlib import Path; from flows import lock; held = lock.try_acquire(Path(sys.argv[1])); print(bool(held), flush=True); time.sleep(60)"


def hold(path: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().strip() == "True"
    return process


def test_a_living_owner_keeps_the_lock_and_a_killed_one_loses_it(tmp_path):
    path = tmp_path / "step.lock"
    owner = hold(path)
    try:
        assert lock.try_acquire(path) is None
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        held = lock.try_acquire(path, step="t2i")
        assert held is not None
        assert lock.read(path)["pid"] == os.getpid() and lock.read(path)["step"] == "t2i"
        held.release()
        assert lock.read(path) is None
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()


def write_owner(path: Path, **owner) -> None:
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "process_started": 0.0, "token": "theirs", **owner}))


def test_an_owner_elsewhere_lives_by_its_heartbeat(tmp_path):
    path = tmp_path / "step.lock"
    write_owner(path)
    assert lock.try_acquire(path) is None
    old = time.time() - lock.STALE_S - 1
    os.utime(path, (old, old))
    assert lock.try_acquire(path) is not None


def test_a_reused_pid_is_not_taken_for_the_owner(tmp_path):
    path = tmp_path / "step.lock"
    write_owner(path, pid=os.getpid(), host=socket.gethostname(), process_started=12345.0)
    assert lock.try_acquire(path) is not None


def test_a_lock_taken_over_is_noticed_and_not_removed_by_the_old_owner(tmp_path):
    path = tmp_path / "step.lock"
    held = lock.try_acquire(path)
    held.check()
    write_owner(path)
    with pytest.raises(lock.LockLost, match="elsewhere"):
        held.check()
    held.release()
    assert lock.read(path)["token"] == "theirs"


def test_a_torn_lock_file_blocks_nobody(tmp_path):
    path = tmp_path / "step.lock"
    path.write_text('{"pid": 1, "ho')
    assert lock.try_acquire(path) is not None
