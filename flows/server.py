"""A Prefect server on this machine for as long as a run goes on or schedules are served.
Prefect's own ephemeral server does not schedule, shows no UI and outlives a killed parent; this one does not."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

STARTUP_S = 240.0
"""A cold server needs some 20 CPU-seconds; on a busy machine that can take minutes."""


class ServerError(RuntimeError):
    """No Prefect server; the message says why and where its log is."""


@contextmanager
def prefect_server(lake_root: Path, port: int | None = None) -> Iterator[str]:
    """URL of the Prefect API: PREFECT_API_URL where it is set, else of a server started here on loopback and stopped at the end.

    Without `port` a free one is taken. Call it before Prefect is imported, for Prefect reads its settings on import. The log is
    <lake>/prefect/server.log. Raises ServerError when the server does not answer in time.
    """
    if given := os.environ.get("PREFECT_API_URL"):
        yield given
        return
    port = port or _free_port()
    api = f"http://127.0.0.1:{port}/api"
    log = lake_root / "prefect" / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    if _healthy(api):
        raise ServerError(f"port {port} already serves a Prefect API: set PREFECT_API_URL={api} to use it, or give another --port")
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_end_with_parent()
        )
    try:
        end = time.monotonic() + STARTUP_S
        while not _healthy(api):
            if process.poll() is not None or time.monotonic() > end:
                raise ServerError(f"the Prefect server did not come up on port {port} within {STARTUP_S:.0f} s: see {log}")
            time.sleep(0.5)
        os.environ["PREFECT_API_URL"] = api
        yield api
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_with_parent() -> Callable[[], None] | None:
    """On Linux, a hook for the child that asks the kernel to end it when its parent is gone, even by kill -9."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, set_parent_death_signal = ctypes.CDLL(None).prctl, 1  # PR_SET_PDEATHSIG in <linux/prctl.h>

    def hook() -> None:
        prctl(set_parent_death_signal, signal.SIGTERM)

    return hook


def _healthy(api: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
