"""What a record brings besides its images and its instruction: masks, further wordings, captions of single images, scores, preferences.
Adds the rows of these to the tables that ingest writes."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
from PIL import Image

from dreamlite_data import images
from dreamlite_data.operators.change import encode_mask
from dreamlite_data.settings import IngestSettings
from dreamlite_data.sources.base import Record, Unit

SIDE_TABLES = ("instructions", "edit_masks", "preferences", "provider_scores")
PROVIDER = "provider"


def add_preference(unit: Unit, record: Record, record_id: str, found: dict[str, dict], rows: dict[str, list[dict]]) -> str:
    """Add the comparison of a record with a `preference`; returns its id."""
    said = record.preference
    ids = {role: found[role]["image_id"] for role in ("source", "left", "right")}
    words = record.metadata["instruction"].strip()
    parts = (ids["source"], ids["left"], ids["right"], words, said.vote or "")
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    rows["preferences"].append({
        "preference_id": key, "source_image_id": ids["source"], "left_image_id": ids["left"], "right_image_id": ids["right"],
        "instruction": words, "edit_type": record.metadata.get("edit_type"), "left_model": said.left_model,
        "right_model": said.right_model, "left_follow": said.left_follow, "right_follow": said.right_follow,
        "left_quality": said.left_quality, "right_quality": said.right_quality, "vote": said.vote, "origin": origin_of(unit, record),
        "licence": licence_of(unit, record), "record_id": record_id,
    })  # fmt: skip
    return key


def session_of(unit: Unit, record: Record) -> dict[str, Any]:
    """session_id, turn and relation of a triplet. A session is named within its source: providers count from 1."""
    session = record.metadata.get("session_id")
    turn = record.metadata.get("turn")
    relation = record.metadata.get("relation")
    return {
        "session_id": f"{unit.source}/{session}" if isinstance(session, (str, int)) and session != "" else None,
        "turn": turn if isinstance(turn, int) and not isinstance(turn, bool) and abs(turn) < 2**31 else None,
        "relation": relation if isinstance(relation, str) else "",
    }


def origin_of(unit: Unit, record: Record) -> str:
    """The data set that a record was first published in; a source that says nothing of it is its own origin."""
    said = record.metadata.get("origin")
    return said.strip() if isinstance(said, str) and said.strip() else unit.origin or unit.source


def licence_of(unit: Unit, record: Record) -> str | None:
    """The licence of a record: its own, else that of its source."""
    said = record.metadata.get("licence")
    return said.strip() if isinstance(said, str) and said.strip() else unit.licence


def instruction_id(edit_id: str, form: str, text: str) -> str:
    """Id of a wording: the same words in the same form about the same triplet are one."""
    return hashlib.sha256(f"{edit_id}\0{form}\0{text}".encode()).hexdigest()


def add_wordings(record: Record, edit_id: str, rows: dict[str, list[dict]]) -> None:
    """Further forms of a triplet's instruction, in the provider's words."""
    for form, text in record.forms:
        key = instruction_id(edit_id, form, text)
        rows["instructions"].append({"instruction_id": key, "edit_id": edit_id, "form": form, "text": text, "instructor": PROVIDER})


def add_mask(record: Record, edit_id: str, size_px: tuple[int, int], rows: dict[str, list[dict]], limits: IngestSettings) -> str | None:
    """The provider's mask as a 1-bit PNG of the target's size_px (width, height). Returns a note where it is of no use: the triplet
    is whole without it."""
    if record.mask is None:
        return None
    try:
        edited = mask_pixels(record.mask, record.mask_marks, size_px, limits)
    except images.BadImage as bad:
        return f"mask_{bad.reason}"
    rows["edit_masks"].append({
        "edit_id": edit_id, "mask_png": encode_mask(edited), "mask_fraction": float(edited.mean()), "origin": PROVIDER,
    })  # fmt: skip
    return None


def mask_pixels(payload: bytes, marks: str, size_px: tuple[int, int], limits: IngestSettings) -> np.ndarray:
    """bool [height, width], True where `marks` ('white', 'black' or 'transparent') marks the edit. Raises BadImage."""
    images.decode(payload, limits)  # says whether it is an image, affordable and whole
    with Image.open(io.BytesIO(payload), formats=images.FORMATS) as mask:
        if marks == "transparent":
            level = 255 - np.asarray(mask.convert("RGBA"))[..., 3]
        else:
            level = np.asarray(mask.convert("L"))
            level = level if marks == "white" else 255 - level
    edited = Image.fromarray(level)
    if edited.size != size_px:
        edited = edited.resize(size_px, Image.Resampling.NEAREST)
    return np.asarray(edited) >= 128


def add_captions(record: Record, found: dict[str, dict], caption_id: Any, rows: dict[str, list[dict]]) -> None:
    """Words that the provider has about the source or the target alone."""
    for role, text in sorted(record.captions.items()):
        image_id = found[role]["image_id"]
        rows["captions"].append({
            "caption_id": caption_id(image_id, PROVIDER, text), "image_id": image_id, "style": PROVIDER, "text": text, "captioner": PROVIDER,
        })  # fmt: skip


def add_scores(record: Record, record_id: str, subject_id: str, rows: dict[str, list[dict]]) -> None:
    """The provider's numbers about one subject."""
    for name, value in sorted(record.scores.items()):
        rows["provider_scores"].append({"subject_id": subject_id, "record_id": record_id, "name": name, "value": value})
