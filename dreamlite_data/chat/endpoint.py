"""A chat model behind an OpenAI-compatible server (vLLM, SGLang, a hosted API): POST <base_url>/chat/completions.
Everything is bounded: seconds, tries, calls at once, bytes of an answer. The key comes from the environment alone."""

from __future__ import annotations

import base64
import functools
import json
import os
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from dreamlite_data.chat.base import Question, call_of
from dreamlite_data.responses import CallFailed, Response, Responses

TRANSIENT_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
HOPELESS_STATUS = {401: "refused the key", 403: "refused the key", 404: "knows no such path or model"}
ANSWER_LIMIT_BYTES = 2**20
GIVE_UP_AFTER = 16
"""Calls failing in a row, each after all its attempts, that show the server to be down rather than a call to be bad."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


class EndpointError(RuntimeError):
    """The server answers no question as things stand: wrong address, wrong key, unknown model, or down."""


class _Busy(CallFailed):
    """A passing failure; `retry_after` is the header with which the server says when to come back."""

    def __init__(self, message: str, retry_after: str | None) -> None:
        super().__init__(message, transient=True)
        self.retry_after = retry_after


class EndpointChat:
    """`model` as the server names it, `base_url` up to and with /v1. `key_variable` names the environment variable with the
    bearer token (None: no token). `attempts` are made for a call before it counts as failed, `concurrency` calls at once."""

    def __init__(
        self, model: str, base_url: str, *, key_variable: str | None = None, timeout_s: float = 60.0, attempts: int = 3, concurrency: int = 8
    ) -> None:
        self.name = model
        self.digest = f"endpoint:{model}"
        self.generation: dict[str, Any] = {"temperature": 0.0, "seed": 0}
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        self.timeout_s, self.attempts, self.concurrency = timeout_s, attempts, concurrency
        self._headers = {}
        if key_variable:
            if not os.environ.get(key_variable):
                raise EndpointError(f"the environment variable {key_variable} with the key of {base_url} is not set: export it and run again")
            self._headers = {"Authorization": f"Bearer {os.environ[key_variable]}"}
        self._lock = threading.Lock()
        self._failures = 0

    def ask(self, kind: str, questions: Sequence[Question], responses: Responses) -> list[Response]:
        """As in ChatModel. Each answer is kept the moment it comes. Raises EndpointError where the server refuses every
        call, or has answered none of the last 16."""
        calls = [call_of(self, kind, question) for question in questions]
        answers = [responses.find(call) for call in calls]
        open_ones = [index for index, answer in enumerate(answers) if answer is None]
        if not open_ones:
            return [answer for answer in answers if answer is not None]
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        # trust_env off: a proxy variable of the shell must not carry pictures and keys elsewhere.
        with httpx.Client(timeout=self.timeout_s, headers=self._headers, limits=limits, follow_redirects=False, trust_env=False) as client:
            work = [
                (lambda index=index: responses.answer(calls[index], functools.partial(self._answer, client, questions[index])))
                for index in open_ones
            ]
            with ThreadPoolExecutor(self.concurrency) as pool:
                futures = [pool.submit(one) for one in work]
                try:
                    for index, future in zip(open_ones, futures, strict=True):
                        answers[index] = future.result()
                except EndpointError:
                    for future in futures:
                        future.cancel()
                    raise
        return [answer for answer in answers if answer is not None]

    def _answer(self, client: httpx.Client, question: Question) -> str:
        """One call with its attempts; raises CallFailed, or EndpointError where no call can succeed."""
        if self._failures >= GIVE_UP_AFTER:
            raise EndpointError(
                f"the endpoint {self.url} failed {GIVE_UP_AFTER} calls in a row: see whether it is up, and run again; what it answered is kept"
            )
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in question.images]
        body = {
            "model": self.name, "max_tokens": question.max_new_tokens, **self.generation,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question.prompt}]}],
        }  # fmt: skip
        failure = CallFailed("no attempt was made", transient=True)
        for attempt in range(self.attempts):
            try:
                text = self._once(client, body)
            except CallFailed as failed:
                failure = failed
                if not failed.transient:
                    self._count(failed=False)  # the server is up: it judged this call
                    raise
                if attempt + 1 < self.attempts:
                    time.sleep(_pause_s(attempt, failed))
                continue
            self._count(failed=False)
            return text
        self._count(failed=True)
        raise failure

    def _count(self, failed: bool) -> None:
        with self._lock:
            self._failures = self._failures + 1 if failed else 0

    def _once(self, client: httpx.Client, body: dict[str, Any]) -> str:
        try:
            with client.stream("POST", self.url, json=body) as reply:
                payload = b""
                for part in reply.iter_bytes():
                    payload += part
                    if len(payload) > ANSWER_LIMIT_BYTES:
                        raise CallFailed(f"the answer is longer than {ANSWER_LIMIT_BYTES} bytes")
                status, after = reply.status_code, reply.headers.get("retry-after")
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise CallFailed(f"no answer from {self.url}: {type(error).__name__}: {error}", transient=True) from None
        if status in HOPELESS_STATUS:
            raise EndpointError(
                f"{self.url} answered {status}: it {HOPELESS_STATUS[status]} ({_excerpt(payload)}). Correct base_url, model or key, and run again"
            )
        if status in TRANSIENT_STATUS:
            raise _Busy(f"{self.url} answered {status}: {_excerpt(payload)}", after)
        if status != 200:
            raise CallFailed(f"{self.url} answered {status}: {_excerpt(payload)}")
        return _text_of(payload)


def _text_of(payload: bytes) -> str:
    """The words in a chat completion; raises CallFailed for anything that is none, or that was cut off."""
    try:
        choice = json.loads(payload)["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise CallFailed(f"the answer is no chat completion: {_excerpt(payload)}") from None
    if not isinstance(text, str) or not text.strip():
        raise CallFailed(f"the answer has no text: {_excerpt(payload)}")
    if reason == "length":
        raise CallFailed("the answer was cut off at max_new_tokens")
    return text


def _data_url(image: bytes) -> str:
    mime = "image/jpeg" if image[:2] == b"\xff\xd8" else "image/webp" if image[8:12] == b"WEBP" else "image/png"
    return f"data:{mime};base64,{base64.b64encode(image).decode()}"


def _pause_s(attempt: int, failed: CallFailed) -> float:
    """Seconds before the next attempt: what the server asks for, else doubling, with jitter so that callers do not meet again."""
    asked = getattr(failed, "retry_after", None)
    pause_s = float(asked) if asked and asked.isdigit() else FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.5)
    return min(LONGEST_PAUSE_S, pause_s)


def _excerpt(payload: bytes) -> str:
    return " ".join(payload[:160].decode("utf-8", "replace").split())
