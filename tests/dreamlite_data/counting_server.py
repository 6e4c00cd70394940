"""A real chat-completions server on this machine that counts: what was asked, what was answered, and can hold its breath.
Tests say what it replies, so that every way in which a server can misbehave is tried over a real socket."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = tuple[int, bytes, dict[str, str]]


def completion(text: str | None, reason: str = "stop") -> Reply:
    """A well-formed answer."""
    body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}]}
    return 200, json.dumps(body).encode(), {}


def sha256_of_image(body: dict) -> str:
    """Of the picture in a request."""
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    return hashlib.sha256(base64.b64decode(url.partition("base64,")[2])).hexdigest()


def words_about_it(body: dict) -> Reply:
    """An answer that depends on picture and prompt."""
    prompt = body["messages"][0]["content"][-1]["text"]
    return completion(f"picture {sha256_of_image(body)[:8]} asked with {hashlib.sha256(prompt.encode()).hexdigest()[:6]}")


class CountingServer:
    """`asked` holds (body, headers) of every request, `answered` counts the replies that were sent. After `hold_after` replies
    it keeps further requests waiting until `release()`, and then drops them without a word."""

    def __init__(self, reply: Callable[[dict], Reply] = words_about_it, hold_after: int | None = None) -> None:
        self.reply, self.hold_after = reply, hold_after
        self.asked: list[tuple[dict, dict]] = []
        self.answered = self.held = 0
        self._lock = threading.Lock()
        self._released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with server._lock:
                    server.asked.append((body, dict(self.headers)))
                    hold = server.hold_after is not None and server.answered >= server.hold_after
                    server.held += hold
                    server.answered += not hold
                if hold:
                    server._released.wait(120)
                    self.close_connection = True
                    return
                status, payload, headers = server.reply(body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def wait_until_held(self, count: int, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.held < count:
            assert time.monotonic() < deadline, f"only {self.held} of {count} requests came"
            time.sleep(0.01)

    def release(self) -> None:
        """Drop what is held, and answer from now on."""
        self.hold_after = None
        self._released.set()

    def __enter__(self) -> CountingServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()
