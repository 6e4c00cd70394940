"""The contract of a chat model: questions with pictures in, one settled answer each out.
A question is known by what it asks and by the ids of its pictures, so that its answer can be kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from dreamlite_data.responses import Call, Response, Responses


@dataclasses.dataclass(frozen=True)
class Question:
    """`prompt` about `images` (encoded bytes, clean RGB; `image_ids` are their sha256), answered in at most
    `max_new_tokens` tokens."""

    prompt: str
    images: tuple[bytes, ...]
    image_ids: tuple[str, ...]
    max_new_tokens: int


class ChatModel(Protocol):
    """`name` is what people call the model, `digest` names its weights, `generation` holds every setting besides a
    question's own that can change an answer."""

    name: str
    digest: str
    generation: dict[str, Any]

    def ask(self, kind: str, questions: Sequence[Question], responses: Responses) -> list[Response]:
        """The answers (`value` is text) in the order of the questions. Calls that `responses` knows are not made again.
        `kind` says what the answers are for ('caption', 'instruction', ...). A question that cannot be answered has
        `error`; raises only where no question at all can be answered as things stand."""
        ...


def call_of(model: ChatModel, kind: str, question: Question) -> Call:
    """The key under which the answer of `model` to `question` is kept."""
    settings = {**model.generation, "max_new_tokens": question.max_new_tokens}
    return Call(kind, model.digest, question.prompt, settings, question.image_ids)
