"""A chat model is asked about each picture once, and what it says is read line by line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dreamlite_data import scenes
from dreamlite_data.chat import EndpointChat, LocalChat, endpoint
from dreamlite_data.images import encode_png
from dreamlite_data.operators.caption import Picture
from dreamlite_data.operators.edit import Edit, ExactEditor, Form, Try
from dreamlite_data.operators.instruction_model import VlmInstructor, parse_proposals
from dreamlite_data.responses import Responses
from tests.dreamlite_data.chat.conftest import chat_folder  # noqa: F401  (fixture)
from tests.dreamlite_data.counting_server import CountingServer, completion, sha256_of_image

PIXELS = [scenes.render(scenes.sample_scene(np.random.default_rng(seed))) for seed in range(3)]
PICTURES = [Picture(f"{number:064x}", encode_png(pixels)) for number, pixels in enumerate(PIXELS)]


def test_a_models_answer_is_read_line_by_line() -> None:
    answer = "1. remove: take the cup away\n- **colour**: make the roof red\nnonsense: 7\n\nadd: take the cup away \x07\nTurn it: upside down now\nadd: " + "x" * 400
    assert parse_proposals(answer) == [
        ("remove", "take the cup away"), ("colour", "make the roof red"), ("unmapped", "Turn it: upside down now")]  # fmt: skip
    assert parse_proposals("") == parse_proposals("\n \n3\n") == []


def test_every_picture_is_asked_about_once_and_its_lines_become_requests(tmp_path: Path) -> None:
    words = "remove: take the red circle away\nbackground: make the sky dark\nadd: a cat"
    with CountingServer(lambda body: completion(words)) as server:
        for _ in range(2):
            instructor = VlmInstructor(EndpointChat("vlm", server.url), Responses(tmp_path), 2, max_new_tokens=40)
            instructor.prepare(PICTURES)
        assert server.answered == len(PICTURES)
        VlmInstructor(EndpointChat("vlm", server.url), Responses(tmp_path), 3, max_new_tokens=40).prepare(PICTURES)
        assert server.answered == 2 * len(PICTURES)  # three edits are another question
    requests = list(instructor.requests(PIXELS[0], PICTURES[0].image_id))
    assert [(request.edit_type, request.instruction) for request in requests] == [
        ("remove", "take the red circle away"), ("background", "make the sky dark")]  # fmt: skip
    assert requests[0].forms == (Form("short", "take the red circle away", instructor.prompt_id),)
    asked = {sha256_of_image(body): body for body, _ in server.asked}
    assert len(asked) == len(PICTURES)
    assert all("different edits of this picture" in str(body) and body["max_tokens"] == 40 for body in asked.values())


def test_a_plan_asks_each_picture_for_its_own_types_alone(tmp_path: Path) -> None:
    kinds = [["object/add"], ["scene/background", "object/remove"], []]
    lines = "remove: take the red circle away\nadd: put a cat there\nbackground: make the sky dark"
    with CountingServer(lambda body: completion(lines)) as server:
        instructor = VlmInstructor(EndpointChat("vlm", server.url), Responses(tmp_path), 3, max_new_tokens=40)
        instructor.prepare(PICTURES, kinds)
        operator = Edit(3, instructor, _Takes(), "edit_model", plan="p")
        columns = {"image_id": [one.image_id for one in PICTURES], "bytes": [one.payload for one in PICTURES], "wanted": kinds}
        answer = operator(pa.table(columns))
        assert server.answered == len(PICTURES)  # the operator asks what was asked here
    asked = {sha256_of_image(body): body["messages"][0]["content"][-1]["text"] for body, _ in server.asked}
    prompts = [asked[hashlib.sha256(one.payload).hexdigest()] for one in PICTURES]
    assert "Propose 1 different" in prompts[0] and "one of object/add." in prompts[0]
    assert "Propose 2 different" in prompts[1] and "one of object/remove, scene/background." in prompts[1]
    assert prompts[2] == instructor.prompt
    forms = [[request.forms[0].prompt_id for request in instructor.requests(pixels, one.image_id)] for pixels, one in zip(PIXELS, PICTURES, strict=True)]
    assert [len(one) for one in forms] == [1, 2, 3] and len({name for one in forms for name in one}) == 3
    # The first line is no answer to the first question, and the third line was one too many for the second.
    assert answer["edits"].to_pylist() == [0, 1, 0] and answer["error"].to_pylist() == [None] * 3
    edits = operator.side_tables(None, answer)["edits"].to_pylist()
    assert [(row["source_image_id"], row["edit_type"]) for row in edits] == [(PICTURES[1].image_id, "remove")]


def test_a_local_model_answers_the_same_from_the_cache_as_when_it_was_asked(chat_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    def said() -> list:
        instructor = VlmInstructor(LocalChat(str(chat_folder), "w"), Responses(tmp_path), 2, max_new_tokens=48)
        instructor.prepare(PICTURES)
        return [instructor._answers[picture.image_id] for picture in PICTURES]

    first = said()
    kept = sorted(path.read_bytes() for path in tmp_path.rglob("*.json"))
    assert said() == first and len(kept) == len(PICTURES)
    assert len({(answer.value, answer.error) for answer in first}) > 1  # it looks at the picture


def test_a_failed_call_is_a_row_that_says_whether_it_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.001)
    ids = [sha256_of_image({"messages": [{"content": [{"image_url": {"url": endpoint._data_url(one.payload)}}]}]}) for one in PICTURES]
    replies = dict(zip(ids, [(503, b"busy", {}), completion("remove: take it away", reason="length"), completion("no edit")], strict=True))
    with CountingServer(lambda body: replies[sha256_of_image(body)]) as server:
        operator = Edit(1, VlmInstructor(EndpointChat("vlm", server.url, attempts=1), Responses(tmp_path), 1), _NoEditor(), "edit_model")
        answer = operator(pa.table({"image_id": [one.image_id for one in PICTURES], "bytes": [one.payload for one in PICTURES]})).to_pylist()
    assert [row["retry"] for row in answer] == [True, False, None]
    assert "answered 503" in answer[0]["error"] and "cut off at max_new_tokens" in answer[1]["error"] and answer[2]["error"] is None


class _NoEditor(ExactEditor):
    """An editor that cannot follow: the instructor alone is looked at."""

    def tries(self, pixels, image_id, request) -> list:
        return []


class _Takes(_NoEditor):
    """An editor that turns every picture into its negative, whatever is asked."""

    name = "model"

    def tries(self, pixels, image_id, request) -> list:
        return [Try(request, 255 - pixels)]
