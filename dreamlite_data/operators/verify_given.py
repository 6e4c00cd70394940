"""Measures of a triplet that come from what other operators found: objects that were read, words, embeddings, a model's answer.
One that was not taken is absent; one that the words do not call for is not applicable."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from dreamlite_data import scenes
from dreamlite_data.operators.instruction import parse_instruction
from dreamlite_data.operators.verify_measures import NOT_APPLICABLE, Measures
from dreamlite_data.operators.wording import said_texts

SHORTEST_WORD = 3
SAME_WORD = 0.7
"""Readers take a leaf for a letter now and then, and one word for two that differ by one: so much of a word must be new to count."""


def given_measures(row: dict[str, Any]) -> Measures:
    """The measures for one triplet from the columns of `verify_triplet.triplet_subjects`, each None where its operator
    has no row for it."""
    words_of = {"source_words": row["source_words"], "target_words": row["target_words"]}
    return {
        "clip_target": row["clip_target"], "clip_direction": row["clip_direction"],
        "vqa_yes": None if row["vqa_yes"] is None else float(row["vqa_yes"]),
        "object_in_target": object_in_target(row["instruction"], row["source_scene"], row["target_scene"]),
        **text_measures(row["instruction"], **words_of, source_fraction=row["source_text"], target_fraction=row["target_text"]),
    }  # fmt: skip


def object_in_target(instruction: str, source_scene: str | None, target_scene: str | None) -> float | None:
    """1 where the thing that an instruction of the small world adds, puts in another's place or removes is seen in the target,
    0 where it is not; None where no scene was read. The verifier of scenes is the detector."""
    if not source_scene or not target_scene:
        return None
    edit, _ = parse_instruction(instruction, scenes.Scene.from_json(source_scene))
    if edit is None:
        return None
    thing = edit.before if edit.kind == "remove" else edit.after
    if thing is None:
        return NOT_APPLICABLE
    return float(thing.key() in {item.key() for item in scenes.Scene.from_json(target_scene).objects})


def text_measures(
    instruction: str, source_words: Sequence[str] | None, target_words: Sequence[str] | None, source_fraction: float | None,
    target_fraction: float | None,
) -> Measures:  # fmt: skip
    """`text_before`: the old words are read in the source; `text_after`: the new ones in the target; `text_gone`: the old ones
    no longer there; each 1 or 0. `text_growth`: share of the picture that text covers more than before. `text_unasked`: how many
    words are read in the target alone and were not asked for. None where no reader of text has seen the pictures."""
    if source_words is None or target_words is None or source_fraction is None or target_fraction is None:
        return {"text_before": None, "text_after": None, "text_gone": None, "text_growth": None, "text_unasked": None}
    old, new = said_texts(instruction)
    before, after = _letters(" ".join(source_words)), _letters(" ".join(target_words))
    return {
        "text_before": NOT_APPLICABLE if old is None else float(_letters(old) in before),
        "text_after": NOT_APPLICABLE if new is None else float(_letters(new) in after),
        "text_gone": NOT_APPLICABLE if old is None else float(_letters(old) not in after or _letters(old) in _letters(new or "")),
        "text_growth": float(target_fraction) - float(source_fraction),
        "text_unasked": float(_unasked(target_words, known=[*source_words, new or ""])),
    }


def _unasked(words: Sequence[str], known: Sequence[str]) -> int:
    """How many of the words are no part of the known ones and like none of them."""
    seen = [_letters(word) for word in known]
    together = "".join(seen)
    found = [letters for word in words if len(letters := _letters(word)) >= SHORTEST_WORD and letters not in together]
    return sum(all(difflib.SequenceMatcher(None, letters, other).ratio() < SAME_WORD for other in seen) for letters in found)


def _letters(text: str) -> str:
    """Letters and digits alone: readers differ in case, and break a line where they like."""
    return re.sub(r"[\W_]+", "", text).casefold()
