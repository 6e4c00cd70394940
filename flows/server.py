"""A Prefect server on this machine for as long as schedules are served here.
Prefect's own embedded server does not schedule; a server that the user already has is used instead of a second one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.config import ConfigError


@contextmanager
def prefect_server(lake_root: Path, port: int = 4200, wait_s: float = 240.0) -> Iterator[str]:
    """URL of the Prefect API: PREFECT_API_URL where it is set, else of a server started here on loopback and stopped at the end.

    Call it before Prefect is imported, for Prefect reads its settings on import. The server's log is <lake>/prefect/server.log.
    """
    if given := os.environ.get("PREFECT_API_URL"):
        yield given
        return
    api = f"http://127.0.0.1:{port}/api"
    log = lake_root / "prefect" / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    if _healthy(api):
        raise ConfigError(f"port {port} already serves a Prefect API: set PREFECT_API_URL={api} to use it, or give another --port")
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + wait_s
        while not _healthy(api):
            if process.poll() is not None or time.monotonic() > end:
                raise ConfigError(f"the Prefect server did not come up on port {port} within {wait_s:.0f} s: see {log}")
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


def _healthy(api: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
