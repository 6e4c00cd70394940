"""A chat model in this process: any image-text-to-text model of transformers, from a folder or the hub.
Greedy, so that an answer depends on nothing but question and weights; torch is imported only when a question is open."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dreamlite_data.chat.base import Question, call_of
from dreamlite_data.inference import worker_threads
from dreamlite_data.responses import CallFailed, Response, Responses


class LocalChatError(RuntimeError):
    """There is no chat model where the settings say; the message names the place and why."""


class LocalChat:
    """`model` is a folder or a hub id (then with `revision`), `digest` the digest of its weights. `batch` questions pass at
    once on a GPU; on a CPU each passes alone, so that its answer does not depend on its neighbours' padding."""

    def __init__(self, model: str, digest: str, *, revision: str | None = None, batch: int = 8) -> None:
        self.name = Path(model).name
        self.digest = digest
        self.generation: dict[str, Any] = {"do_sample": False}
        self._model, self._revision, self._batch = model, revision, batch

    def ask(self, kind: str, questions: Sequence[Question], responses: Responses) -> list[Response]:
        """As in ChatModel. Raises LocalChatError where a question is open and there is no model."""
        calls = [call_of(self, kind, question) for question in questions]
        answers = [responses.find(call) for call in calls]
        # Equal lengths share a generate call; the order within is that of the questions.
        groups: dict[int, list[int]] = {}
        for index, answer in enumerate(answers):
            if answer is None:
                groups.setdefault(questions[index].max_new_tokens, []).append(index)
        for limit, indices in groups.items():
            with worker_threads():
                for part, outcomes in self._parts(questions, indices, limit):
                    for index, outcome in zip(part, outcomes, strict=True):
                        failed = isinstance(outcome, CallFailed)
                        answers[index] = responses.keep_failure(calls[index], outcome) if failed else responses.keep(calls[index], outcome)
        return [answer for answer in answers if answer is not None]

    def _parts(self, questions: Sequence[Question], indices: list[int], limit: int) -> Iterator[tuple[list[int], list[str | CallFailed]]]:
        loaded = _load(self._model, self._revision)
        step = self._batch if loaded.device != "cpu" else 1
        for start in range(0, len(indices), step):
            part = indices[start : start + step]
            yield part, self._answers(loaded, [questions[index] for index in part], limit)

    @staticmethod
    def _answers(loaded: _Loaded, questions: list[Question], limit: int) -> list[str | CallFailed]:
        """Text or failure of each question; where a batch fails, each of its questions is tried alone."""
        import torch

        try:
            return loaded.generate(questions, limit)
        except torch.OutOfMemoryError as error:
            failure = CallFailed(f"out of memory: {error}", transient=True)
        except (ValueError, TypeError, LookupError, OSError, RuntimeError) as error:
            failure = CallFailed(f"{type(error).__name__}: {error}")
        if len(questions) == 1:
            return [failure]
        return [LocalChat._answers(loaded, [question], limit)[0] for question in questions]


class _Loaded:
    """Weights and processor, once per process."""

    def __init__(self, model: str, revision: str | None) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        several = self.device == "cuda" and torch.cuda.device_count() > 1
        network = AutoModelForImageTextToText.from_pretrained(
            model, revision=revision, dtype=torch.bfloat16 if self.device == "cuda" else torch.float32, use_safetensors=True,
            device_map="auto" if several else None,
        )  # fmt: skip
        self.network = (network if several else network.to(self.device)).eval()
        self.processor = load_processor(model, revision)
        self.processor.tokenizer.padding_side = "left"
        ends = self.network.generation_config.eos_token_id
        if ends is None:
            ends = self.processor.tokenizer.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])

    def generate(self, questions: list[Question], limit: int) -> list[str | CallFailed]:
        import torch

        pictures = [[Image.open(io.BytesIO(payload)).convert("RGB") for payload in question.images] for question in questions]
        texts = [
            self.processor.apply_chat_template([{"role": "user", "content": [*[{"type": "image"}] * len(question.images),
             {"type": "text", "text": question.prompt}]}], tokenize=False, add_generation_prompt=True)
            for question in questions
        ]  # fmt: skip
        inputs = self.processor(text=texts, images=pictures, padding=True, return_tensors="pt").to(self.network.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.network.dtype)
        with torch.inference_mode():
            made = self.network.generate(**inputs, max_new_tokens=limit, do_sample=False)
        rows = made[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._text(row) for row in rows]

    def _text(self, tokens: list[int]) -> str | CallFailed:
        if not self.ends & set(tokens):
            return CallFailed("the answer was cut off at max_new_tokens")
        text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return text or CallFailed("the answer has no text")


@functools.cache
def _load(model: str, revision: str | None) -> _Loaded:
    try:
        return _Loaded(model, revision)
    except (OSError, ValueError, KeyError) as error:
        raise LocalChatError(f"{model} holds no image-text-to-text model with its processor: {error}") from error


def load_processor(model: str, revision: str | None) -> Any:
    """The processor of a chat model for still pictures, with images read by PIL: the same pixels with and without torchvision.

    Processors that also read video want torchvision even where no video is ever shown to them; those lose that half.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    images = AutoImageProcessor.from_pretrained(model, revision=revision, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    base = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(model, revision=revision))]

    class StillImageProcessor(base):  # type: ignore[misc, valid-type]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in base.get_attributes() if name != "video_processor"]

        def check_argument_for_proper_class(self, argument_name: str, argument: object) -> type:
            return type(None) if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    return StillImageProcessor(image_processor=images, tokenizer=tokenizer, chat_template=_chat_template(model, revision, tokenizer))


def _chat_template(model: str, revision: str | None, tokenizer: Any) -> str:
    """The template that comes with the model: its own file, else the tokenizer's."""
    from transformers.utils import cached_file

    found = {
        name: cached_file(model, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        for name in ("chat_template.jinja", "chat_template.json")
    }
    if found["chat_template.jinja"]:
        return Path(found["chat_template.jinja"]).read_text()
    if found["chat_template.json"]:
        return json.loads(Path(found["chat_template.json"]).read_text())["chat_template"]
    if tokenizer.chat_template:
        return tokenizer.chat_template
    raise ValueError(f"{model} has no chat template: copy chat_template.jinja (or .json) of the released model beside its config.json")
