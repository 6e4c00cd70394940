"""Over a real socket: an answer is words, a nuisance is waited out, a bad answer costs its row, a broken server ends the run."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamlite_data.chat import EndpointChat, EndpointError, Question, endpoint
from dreamlite_data.responses import Responses
from tests.dreamlite_data.counting_server import CountingServer, completion, sha256_of_image, words_about_it


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.001)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def questions(count: int) -> list[Question]:
    images = [png(number) for number in range(count)]
    return [Question("what is this?", (image,), (hashlib.sha256(image).hexdigest(),), 16) for image in images]


def ask(server: CountingServer, folder: Path, count: int = 1, **options: object) -> list:
    return EndpointChat("captioner-7b", server.url, **options).ask("caption", questions(count), Responses(folder))


def test_every_question_is_asked_once_with_its_picture_and_answered_in_order(tmp_path: Path) -> None:
    with CountingServer() as server:
        answers = ask(server, tmp_path, 12, concurrency=4)
        assert [answer.value.split()[1] for answer in answers] == [question.image_ids[0][:8] for question in questions(12)]
        assert {sha256_of_image(body) for body, _ in server.asked} == {question.image_ids[0] for question in questions(12)}
        body, headers = server.asked[0]
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("captioner-7b", 16, 0.0)
        assert "Authorization" not in headers
        assert ask(server, tmp_path, 12) == answers
        assert server.answered == 12


def test_a_busy_server_is_asked_again(tmp_path: Path) -> None:
    replies = iter([(503, b"loading", {}), (429, b"slow down", {"retry-after": "0"}), completion("a cat")])
    with CountingServer(lambda body: next(replies)) as server:
        assert [answer.value for answer in ask(server, tmp_path, attempts=3)] == ["a cat"]
        assert server.answered == 3


def test_attempts_are_bounded_and_the_failure_may_be_tried_again_later(tmp_path: Path) -> None:
    with CountingServer(lambda body: (503, b"loading", {})) as server:
        [answer] = ask(server, tmp_path, attempts=2)
        assert answer.retry and "answered 503: loading" in answer.error and server.answered == 2
        server.reply = words_about_it
        [answer] = ask(server, tmp_path)
        assert answer.error is None and server.answered == 3


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((200, b"<html>hello</html>", {}), "no chat completion: <html>hello</html>"),
        ((200, b'{"choices": []}', {}), "no chat completion"),
        ((200, b"[1, 2]", {}), "no chat completion"),
        ((200, json.dumps({"choices": [{"message": {"content": [{"type": "text"}]}}]}).encode(), {}), "has no text"),
        (completion(None), "has no text"),
        (completion("  "), "has no text"),
        (completion("a cat that", "length"), "cut off at max_new_tokens"),
        ((400, b'{"error": "image too large"}', {}), "answered 400"),
        ((200, b"x" * (2**20 + 1), {}), "longer than 1048576 bytes"),
        ((302, b"", {"location": "http://192.0.2.1/"}), "answered 302"),
    ],
)
def test_a_malformed_answer_is_the_error_of_its_row_and_is_not_asked_for_again(tmp_path: Path, reply: tuple, said: str) -> None:
    bad = questions(3)[1].image_ids[0]
    with CountingServer(lambda body: reply if sha256_of_image(body) == bad else words_about_it(body)) as server:
        answers = ask(server, tmp_path, 3)
        assert [answer.error is None for answer in answers] == [True, False, True]
        assert said in answers[1].error and not answers[1].retry
        assert ask(server, tmp_path, 3) == answers and server.answered == 3


@pytest.mark.parametrize(("status", "said"), [(401, "refused the key"), (404, "knows no such path or model")])
def test_a_server_that_refuses_everything_ends_the_run_and_nothing_is_kept(tmp_path: Path, status: int, said: str) -> None:
    with CountingServer(lambda body: (status, b"no", {})) as server:
        with pytest.raises(EndpointError, match=said):
            ask(server, tmp_path, 30, concurrency=1)
        assert server.answered < 5
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_server_that_is_down_is_given_up_on(tmp_path: Path) -> None:
    with CountingServer(lambda body: (502, b"gone", {})) as server:
        with pytest.raises(EndpointError, match="failed 16 calls in a row"):
            ask(server, tmp_path, 30, attempts=1, concurrency=1)
        assert server.answered == 16


def test_a_slow_answer_is_a_passing_failure(tmp_path: Path) -> None:
    with CountingServer(hold_after=0) as server:
        [answer] = ask(server, tmp_path, attempts=1, timeout_s=0.2)
        assert answer.retry and "ReadTimeout" in answer.error


def test_the_key_comes_from_the_environment_and_is_stored_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTION_KEY", "very-secret")
    with CountingServer() as server:
        ask(server, tmp_path, key_variable="CAPTION_KEY")
        assert server.asked[0][1]["Authorization"] == "Bearer very-secret"
    assert not any("very-secret" in file.read_text() for file in tmp_path.rglob("*.json"))
    monkeypatch.delenv("CAPTION_KEY")
    with pytest.raises(EndpointError, match="environment variable CAPTION_KEY .* is not set"):
        EndpointChat("captioner-7b", "http://127.0.0.1:9/v1", key_variable="CAPTION_KEY")
