"""Ask a chat model whether an edit was done: both pictures and the instruction, yes or no.
It is asked last, and only about triplets that no cheaper condition of their rule has failed; its answers are kept per call."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dreamlite_data import schema
from dreamlite_data.chat import Question
from dreamlite_data.chat.backends import chat_model
from dreamlite_data.model_settings import JudgeSettings
from dreamlite_data.operators.describe import clean
from dreamlite_data.operators.verify_rules import Rules, load_rules
from dreamlite_data.operators.verify_triplet import JUDGED, Inputs, judged, judging
from dreamlite_data.responses import Response, Responses

PROMPT = (
    "The first picture was edited, the second is the result. The instruction was: {instruction}\n"
    "Does the second picture show what the instruction asks for, with everything else as it was? Answer with one word, yes or no."
)
PROMPT_ID = f"edit-question/{hashlib.sha256(PROMPT.encode()).hexdigest()[:12]}"
_ANSWER = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


class EditQuestion:
    """Operator over measured triplets with both images."""

    name = "edit_question"
    version = 1
    reads = (*JUDGED, "source_image_id", "target_image_id", "source_bytes", "target_bytes")
    table = "op_edit_question"
    schema = schema.OPERATORS["op_edit_question"]

    def __init__(self, judge: JudgeSettings, weights: str, responses: Path, inputs: Inputs, rules: Rules | None = None) -> None:
        """`weights` is the digest of the judge's weights, `responses` the folder of the kept answers, `inputs` what the
        cheaper conditions read."""
        self.judge, self.weights, self.responses, self.inputs, self.rules = judge, weights, responses, inputs, rules or load_rules()
        self.resources = {"num_cpus": 1.0} | ({"num_gpus": judge.num_gpus} if judge.num_gpus else {})

    def config(self) -> dict[str, Any]:
        model = {"backend": self.judge.backend, "model": self.judge.name(), "weights": self.weights, "prompt": PROMPT}
        return {**model, "max_new_tokens": self.judge.max_new_tokens, **judging(self.inputs, self.rules)}

    def __call__(self, rows: pa.Table) -> pa.Table:
        narrow = rows.select([name for name in self.reads if not name.endswith("_bytes")]).to_pylist()
        skipped = [self._skipped(row) for row in narrow]
        asked = [index for index, reason in enumerate(skipped) if reason is None]
        found = dict(zip(asked, self._ask(rows, asked), strict=True)) if asked else {}
        model = {"model": self.judge.name(), "prompt_id": PROMPT_ID}
        answers = [
            {"subject_id": row["edit_id"], **model, **(_read(found[index]) if index in found else {"skipped": skipped[index]})}
            for index, row in enumerate(narrow)
        ]
        return pa.Table.from_pylist(answers, schema=self.schema)

    def _skipped(self, row: dict[str, Any]) -> str | None:
        """Why nothing is asked about this triplet."""
        if row["measures"]["error"] is not None:
            return row["measures"]["error"]
        verdict = judged(row, self.rules)
        return "; ".join(verdict.failed) if verdict.failed else None

    def _ask(self, rows: pa.Table, indices: Sequence[int]) -> list[Response]:
        model = chat_model(self.judge, self.weights)
        questions = [
            Question(
                PROMPT.format(instruction=row["instruction"]), (row["source_bytes"], row["target_bytes"]),
                (row["source_image_id"], row["target_image_id"]), self.judge.max_new_tokens,
            )
            for row in rows.take(pa.array(indices)).to_pylist()
        ]  # fmt: skip
        return model.ask("question", questions, Responses(self.responses, self.judge.tries))


def _read(response: Response) -> dict[str, Any]:
    if response.error is not None:
        return {"error": response.error, "retry": response.retry}
    text = clean(response.value)
    match = _ANSWER.match(text)
    if match is None:
        return {"answer": text[:200], "error": f"the answer is neither yes nor no: {text[:200]}"}
    return {"answer": text[:200], "yes": match[1].lower() == "yes"}
