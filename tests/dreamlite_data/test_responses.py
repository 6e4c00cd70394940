"""An answer is paid for once, whatever becomes of the process that asked; failures are kept with their right to another try."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from pathlib import Path

import pytest

from dreamlite_data.responses import Call, CallFailed, Response, Responses

CALL = Call("caption", "weights-1", "say what you see", {"max_new_tokens": 8}, ("image-1",))


def fail(transient: bool):
    def ask() -> str:
        raise CallFailed("the server is busy", transient)

    return ask


def never() -> str:
    raise AssertionError("this call is kept, so it may not be made")


def test_a_call_is_made_once(tmp_path: Path) -> None:
    assert Responses(tmp_path).answer(CALL, lambda: "a cat") == Response("a cat")
    assert Responses(tmp_path).answer(CALL, never) == Response("a cat")


@pytest.mark.parametrize(
    "changes",
    [{"kind": "judge"}, {"model": "weights-2"}, {"prompt": "say it"}, {"settings": {"max_new_tokens": 9}}, {"inputs": ("image-1", "image-2")},
     {"inputs": ("image-2",)}],
)  # fmt: skip
def test_anything_that_decides_the_answer_makes_another_call(tmp_path: Path, changes: dict) -> None:
    responses = Responses(tmp_path)
    responses.keep(CALL, "a cat")
    assert responses.find(dataclasses.replace(CALL, **changes)) is None
    assert responses.find(dataclasses.replace(CALL)) == Response("a cat")


def test_a_passing_failure_may_be_tried_again_so_often_and_a_lasting_one_never(tmp_path: Path) -> None:
    responses = Responses(tmp_path, tries=3)
    answers = [responses.answer(CALL, fail(transient=True)) for _ in range(3)]
    assert [answer.retry for answer in answers] == [True, True, False]
    assert responses.answer(CALL, never) == Response(None, "the server is busy")
    lasting = dataclasses.replace(CALL, prompt="draw it")
    assert responses.answer(lasting, fail(transient=False)) == Response(None, "the server is busy")
    assert responses.answer(lasting, never).error == "the server is busy"


def test_a_try_that_succeeds_replaces_the_failure(tmp_path: Path) -> None:
    responses = Responses(tmp_path)
    assert responses.answer(CALL, fail(transient=True)).retry
    assert responses.answer(CALL, lambda: "a cat") == Response("a cat")
    assert responses.answer(CALL, never) == Response("a cat")


def test_an_error_of_the_run_is_kept_nowhere(tmp_path: Path) -> None:
    def broken() -> str:
        raise MemoryError

    with pytest.raises(MemoryError):
        Responses(tmp_path).answer(CALL, broken)
    assert not list(tmp_path.rglob("*"))


def test_a_torn_file_is_no_answer(tmp_path: Path) -> None:
    responses = Responses(tmp_path)
    responses.keep(CALL, "a cat")
    [file] = tmp_path.rglob("*.json")
    file.write_text(file.read_text()[:40])
    assert responses.find(CALL) is None
    assert responses.answer(CALL, lambda: "a dog") == Response("a dog")


def test_what_was_said_about_an_image_can_be_forgotten(tmp_path: Path) -> None:
    responses = Responses(tmp_path)
    other = dataclasses.replace(CALL, inputs=("image-2",))
    both = dataclasses.replace(CALL, inputs=("image-1", "image-2"))
    for call in (CALL, other, both):
        responses.keep(call, "a cat")
    assert responses.forget(["image-1"]) == 2
    assert [responses.find(call) for call in (CALL, both)] == [None, None]
    assert responses.find(other) == Response("a cat")
    assert "image-1" not in "".join(file.read_text() for file in tmp_path.rglob("*.json"))


def _write_many(root: str) -> None:
    responses = Responses(root)
    for number in range(200):
        responses.keep(dataclasses.replace(CALL, prompt=f"question {number % 4}"), "x" * 400_000)


def test_many_processes_write_the_same_calls_and_no_reader_sees_half_a_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(str(tmp_path),)) for _ in range(2)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        for file in tmp_path.rglob("*.json"):
            assert len(json.loads(file.read_text())["value"]) == 400_000
            seen += 1
    assert [writer.exitcode for writer in writers] == [0, 0] and seen
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 4 and all(file.suffix == ".json" for file in files)
