"""Write further captions of an image: one operator per captioner and style, so that a new style costs only its own calls.
Behind it stand the scene reader, a transformers model or an OpenAI-compatible endpoint, as the settings say."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from dreamlite_data import schema
from dreamlite_data.chat import ChatModel, Question
from dreamlite_data.chat.backends import chat_model
from dreamlite_data.model_settings import CaptionBackend
from dreamlite_data.operators.caption import Captioner, Described, Picture, SceneCaptioner
from dreamlite_data.operators.ingest import caption_id
from dreamlite_data.responses import Response, Responses

PROMPTS_FILE = "caption_prompts.yaml"
_THOUGHTS = re.compile(r"^.*</think>", re.DOTALL)
"""Reasoning models think aloud before they answer; some servers leave out the opening tag."""


@functools.cache
def prompts() -> dict[str, Any]:
    """The versioned prompts: {'styles': {style: {id, max_new_tokens, prompt}}, 'refusals': [...]}."""
    return yaml.safe_load(resources.files("dreamlite_data.operators").joinpath(PROMPTS_FILE).read_text(encoding="utf-8"))


class ChatCaptioner:
    """A captioner that asks a chat model the prompt of the style, each (picture, prompt) once in the life of the cache."""

    def __init__(self, model: ChatModel, responses: Responses) -> None:
        self.model, self.responses = model, responses
        self.name, self.digest = model.name, model.digest

    def describe(self, pictures: Sequence[Picture], style: str) -> list[Described]:
        """As in Captioner."""
        asked = prompts()["styles"][style]
        questions = [Question(asked["prompt"], (one.payload,), (one.image_id,), asked["max_new_tokens"]) for one in pictures]
        return [_described(answer) for answer in self.model.ask("caption", questions, self.responses)]


def _described(answer: Response) -> Described:
    if answer.error is not None:
        return Described(error=answer.error, retry=answer.retry)
    text = clean(answer.value)
    if not text:
        return Described(error="the answer has no text")
    if text.lower().startswith(tuple(prompts()["refusals"])):
        return Described(error=f"the model refused: {text[:200]}")
    return Described(text)


def clean(text: str) -> str:
    """A model's answer as a caption: without its thoughts, line breaks and the quotation marks around the whole."""
    text = " ".join(_THOUGHTS.sub("", text).split())
    if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
        text = text[1:-1].strip()
    return text


class Describe:
    """Operator over stored images; captions go to `captions`, how each came about to `op_describe`."""

    version = 1
    reads = ("image_id", "bytes")
    table = "op_describe"
    schema = schema.OPERATORS["op_describe"]

    def __init__(self, backend: CaptionBackend, style: str, weights: str, responses: Path) -> None:
        """`weights` is the digest of the model's weights ('' where it has none), `responses` the folder of the kept answers."""
        self.backend, self.style, self.weights, self.responses = backend, style, weights, responses
        self.name = f"describe_{backend.name()}_{style}"
        self.prompt = None if backend.backend == "scene" else prompts()["styles"][style]
        self.resources = {"num_cpus": 1.0} | ({"num_gpus": backend.num_gpus} if backend.num_gpus else {})

    def config(self) -> dict[str, Any]:
        return {"backend": self.backend.backend, "model": self.backend.name(), "weights": self.weights, "prompt": self.prompt}

    def __call__(self, rows: pa.Table) -> pa.Table:
        captioner = self._captioner()
        pictures = [Picture(row["image_id"], row["bytes"]) for row in rows.select(["image_id", "bytes"]).to_pylist()]
        answers = [
            self._row(picture.image_id, captioner, answer)
            for picture, answer in zip(pictures, _each(captioner, pictures, self.style), strict=True)
        ]
        return pa.Table.from_pylist(answers, schema=self.schema)

    def _captioner(self) -> Captioner:
        backend = self.backend
        if backend.backend == "scene":
            return SceneCaptioner()
        return ChatCaptioner(chat_model(backend, self.weights), Responses(self.responses, backend.tries))

    def _row(self, image_id: str, captioner: Captioner, answer: Described) -> dict[str, Any]:
        return {
            "subject_id": image_id, "style": self.style, "captioner": captioner.name, "text": answer.text,
            "caption_id": caption_id(image_id, self.style, answer.text) if answer.text else None,
            "prompt_id": self.prompt["id"] if self.prompt else None, "reason": answer.reason, "retry": answer.retry, "error": answer.error,
        }  # fmt: skip

    def side_tables(self, rows: pa.Table, answer: pa.Table) -> dict[str, pa.Table]:
        """Rows for `captions`: one for each image that was described."""
        found = [
            {"caption_id": row["caption_id"], "image_id": row["subject_id"], "style": row["style"], "text": row["text"],
             "captioner": row["captioner"]}
            for row in answer.to_pylist()
            if row["text"]
        ]  # fmt: skip
        return {"captions": schema.rows_table("captions", found)}


def _each(captioner: Captioner, pictures: list[Picture], style: str) -> list[Described]:
    """All pictures at once where the captioner asks a model; the scene reader raises on a bad one, so it gets one at a time."""
    if isinstance(captioner, ChatCaptioner):
        return captioner.describe(pictures, style)
    answers = []
    for picture in pictures:
        try:
            answers += captioner.describe([picture], style)
        except Exception as error:  # the contract: a bad row is a result
            answers.append(Described(error=f"{type(error).__name__}: {error}"[:500]))
    return answers
