"""Edit instructions by a vision-language model, local or behind an endpoint: it looks at a picture and proposes edits of it.
Its answers are kept per call, like those of a captioner."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

from dreamlite_data.chat import ChatModel, Question
from dreamlite_data.operators.caption import Picture
from dreamlite_data.operators.change import Pixels
from dreamlite_data.operators.edit import Form, Request
from dreamlite_data.responses import CallFailed, Response, Responses
from dreamlite_data.taxonomy import UNMAPPED, load_taxonomy

PROMPT = (
    "Propose {count} different edits of this picture, each grounded in what it shows. Write one per line, as type: instruction. "
    "The type is one of {types}. The instruction is one plain imperative sentence of at most 25 words."
)
MIN_CHARACTERS, MAX_CHARACTERS = 4, 300
_LINE = re.compile(r"^\s*(?:[-*]|\d+[.)])?\s*(?:\**([A-Za-z][A-Za-z_ /-]{1,30}?)\**\s*:)?\s*(.+?)\s*$")


class VlmInstructor:
    """Asks a chat model for `count` edits of each picture. Its answer is read line by line; each line that is a sentence of
    sensible length is a request, with the type it names, or unmapped."""

    name = "vlm"

    def __init__(self, model: ChatModel, responses: Responses, count: int, max_new_tokens: int = 256) -> None:
        self.model, self.responses, self.count, self.max_new_tokens = model, responses, count, max_new_tokens
        self.prompt = prompt_for(count, {level2 for names in load_taxonomy().levels.values() for level2 in names})
        self.prompt_id = prompt_id(self.prompt)
        self.digest = f"{model.digest} {self.prompt_id} {max_new_tokens}"
        self._answers: dict[str, Response] = {}
        self._asked: dict[str, tuple[str, int]] = {}

    def prepare(self, pictures: Sequence[Picture], wanted: Sequence[Sequence[str]] = ()) -> None:
        """Ask about all `pictures` at once: an endpoint answers several at a time, a GPU in batches, the cache at no cost. Where
        a plan wants types of a picture (`wanted`, one list a picture), it is asked for these alone, for no other would be taken.
        Raises what ChatModel.ask raises where no question can be answered at all."""
        plans = wanted or [()] * len(pictures)
        asked = [(prompt_for(len(kinds), kinds), len(kinds)) if kinds else (self.prompt, self.count) for kinds in plans]
        questions = [
            Question(prompt, (one.payload,), (one.image_id,), self.max_new_tokens) for one, (prompt, _) in zip(pictures, asked, strict=True)
        ]
        answers = self.model.ask("instruction", questions, self.responses)
        self._answers = {one.image_id: answer for one, answer in zip(pictures, answers, strict=True)}
        self._asked = {one.image_id: question for one, question in zip(pictures, asked, strict=True)}

    def requests(self, pixels: Pixels, image_id: str, wanted: Sequence[str] = ()) -> Iterable[Request]:
        """As in Instructor, for a picture that was prepared: what it is wanted for was asked then. Raises CallFailed where the
        model gave no answer about it."""
        answer = self._answers[image_id]
        if answer.error is not None:
            raise CallFailed(f"no instruction: {answer.error}", answer.retry)
        prompt, count = self._asked[image_id]
        for edit_type, words in parse_proposals(answer.value)[:count]:
            form = Form("long" if len(words.split()) > 12 else "short", words, prompt_id(prompt))
            yield Request(edit_type, words, (form,))


def prompt_for(count: int, types: Iterable[str]) -> str:
    """The question for `count` edits of the named types."""
    return PROMPT.format(count=count, types=", ".join(sorted(set(types))))


def prompt_id(prompt: str) -> str:
    """What instructions that answer `prompt` are signed with."""
    return f"vlm/{hashlib.sha256(prompt.encode()).hexdigest()[:12]}"


def parse_proposals(answer: str) -> list[tuple[str, str]]:
    """(edit type, instruction) of every usable line of a model's answer, each instruction once. A type that the taxonomy does
    not know is 'unmapped'; control characters and lines that are no sentence are passed over."""
    found: dict[str, tuple[str, str]] = {}
    for line in answer.splitlines():
        match = _LINE.match("".join(character for character in line if character.isprintable()))
        if match is None:
            continue
        label, words = match.groups()
        words = words.strip(" \"'*")
        known = label is not None and load_taxonomy().edit_type(label).level1 != UNMAPPED
        if label is not None and not known:
            words = f"{label}: {words}" if " " in label else words  # a colon within the sentence, not a type before it
        if MIN_CHARACTERS <= len(words) <= MAX_CHARACTERS and any(character.isalpha() for character in words):
            found.setdefault(words.lower(), (label.strip().lower() if known and label else UNMAPPED, words))
    return list(found.values())
