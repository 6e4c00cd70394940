"""A real HTTP server on this machine that behaves as badly as the web: slow, endless, in circles, refusing, recovering."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.dreamlite_data.sources.tables import picture


class Web(ThreadingHTTPServer):
    """Counts what it is asked in `asked` and when in `times`; `broken` names paths that answer 500."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: collections.Counter[str] = collections.Counter()
        self.times: list[float] = []
        self.broken: set[str] = set()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.stopped = threading.Event()

    def url(self, path: str) -> str:
        """Address of a path on this server."""
        return f"http://127.0.0.1:{self.server_port}/{path}"


class _Handler(BaseHTTPRequestHandler):
    server: Web
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path[1:]
        with self.server.lock:
            self.server.asked[path] += 1
            self.server.times.append(time.monotonic())
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            with contextlib.suppress(ConnectionError):
                self._answer(path)
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def _answer(self, path: str) -> None:
        kind, _, rest = path.partition("/")
        if path in self.server.broken:
            self._send(500, b"")
        elif kind == "ok":
            time.sleep(0.02)
            self._send(200, picture(int(rest)), {"ETag": f'"{rest}"', "Content-Type": "image/png"})
        elif kind == "slow":
            self._stream(b"x", 0.2)
        elif kind == "endless":
            self._stream(b"x" * 65536, 0.0)
        elif kind == "large":
            self._send(200, b"", {"Content-Length": str(2**31)})
        elif kind == "loop":
            self._send(302, b"", {"Location": f"/loop/{int(rest or 0) + 1}"})
        elif kind == "to":
            self._send(302, b"", {"Location": rest})
        elif kind == "robots":
            self._send(200, picture(1), {"X-Robots-Tag": rest.replace("+", " ")})
        elif kind == "flaky":
            self._send(200 if self.server.asked[path] > 1 else 503, picture(3), {"Retry-After": "0"})
        else:
            self._send(int(kind) if kind.isdigit() else 404, b"")

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, chunk: bytes, pause_s: float) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        while not self.server.stopped.is_set():
            self.wfile.write(chunk)
            self.wfile.flush()
            time.sleep(pause_s)


@contextlib.contextmanager
def serving() -> Iterator[Web]:
    """A running server."""
    server = Web()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
