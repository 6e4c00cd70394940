"""A stand-in for the Hugging Face hub: models as folders, served by the four requests that fetching a model makes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = {"main", "v1", COMMIT}


class Handler(BaseHTTPRequestHandler):
    models: dict[str, Path]
    sent: dict[str, int]

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        folder = self.models.get("/".join(parts[:2]))
        if folder is None:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        if len(parts) < 4 or parts[3] not in REVISIONS:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        if api and parts[2] == "revision":
            told = {"id": "/".join(parts[:2]), "sha": COMMIT, "private": False, "siblings": [{"rfilename": name} for name in names]}
            return self._send(200, json.dumps(told).encode(), {"Content-Type": "application/json"}, body)
        if api and parts[2] == "tree":
            files = [{"type": "file", "path": name, "oid": "0" * 40, "size": (folder / name).stat().st_size} for name in names]
            return self._send(200, json.dumps(files).encode(), {"Content-Type": "application/json"}, body)
        if not api and parts[2] == "resolve" and "/".join(parts[4:]) in names:
            return self._file(folder.joinpath(*parts[4:]), body)
        return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)

    def _file(self, path: Path, body: bool) -> None:
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, wanted = 200, self.headers.get("Range")
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            last = min(int(last or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[int(first) : last + 1], 206
        if body:
            self.sent[path.name] = self.sent.get(path.name, 0) + len(content)
        self._send(status, content, headers, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@contextmanager
def hub_server(models: dict[str, Path]) -> Iterator[tuple[str, dict[str, int]]]:
    """Serve `models` ('org/name' -> folder) on this machine; yields the address and the bytes sent of each file name."""
    sent: dict[str, int] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"models": models, "sent": sent}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
