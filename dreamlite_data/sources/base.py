"""What a source is: a list of units (a shard, a file, a range of rows) and the records inside each.
A unit is named by the digest of its content, so new and changed ones are found by comparison with the lake."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from dreamlite_data.settings import IngestSettings
from dreamlite_data.sources.digests import DigestCache

CAPTION_SUFFIXES = ("txt", "caption")
METADATA_SUFFIX = "json"
_NAMES = {"edit": "triplet", "preference": "preference"}


class ShardError(ValueError):
    """A unit cannot be read at all and goes to quarantine; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """Something that is read whole. `domain` is 'scenes', 'photos' or 'other' and tells policies what language to expect;
    `kind` names the reader: 'tar', 'file', 'url', 'parquet', 'saved', 'stream', 'table' or 'samples'. `reading` is what that reader
    needs to know besides the path; `origin` is the data set that the rows were first published in."""

    source: str
    domain: str
    shard: str
    path: str
    digest: str
    kind: str
    size_bytes: int
    licence: str | None = None
    sidecars: tuple[str, ...] = ()
    origin: str | None = None
    reading: Any = None

    @property
    def small(self) -> bool:
        """Whether it holds a single record, which then is named by the unit."""
        return self.kind in ("file", "url")

    @property
    def grouped(self) -> bool:
        """Whether it holds so little that many of its kind make one task."""
        return self.small or self.kind == "samples"

    @property
    def remote(self) -> bool:
        """Whether it is read over the network, so that a failure may pass: it is not left in quarantine but read again."""
        return "://" in self.path or (self.kind == "stream" and self.reading.image_root is None)


@dataclasses.dataclass
class Preference:
    """What people said of two results, 'left' and 'right', of one instruction. Scores keep the provider's own scale."""

    vote: str | None = None
    left_model: str | None = None
    right_model: str | None = None
    left_follow: float | None = None
    right_follow: float | None = None
    left_quality: float | None = None
    right_quality: float | None = None


@dataclasses.dataclass
class Record:
    """One sample of a source. `images` maps a role ('' for a plain sample, 'source' and 'target' for a triplet, 'source', 'left' and
    'right' for a preference) to raw bytes. A record with `error` set is kept as the row of a failure.

    Of a triplet, `forms` are further wordings as (form, text), `mask` is the provider's image of where it was edited, with
    `mask_marks` saying how ('white', 'black' or 'transparent'), and metadata may hold session_id, turn, relation and
    inverse_of (the instruction of the opposite direction). `captions` maps a role to words about that image alone."""

    key: str
    images: dict[str, bytes] = dataclasses.field(default_factory=dict)
    caption: str | None = None
    metadata: dict = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    error: str | None = None
    detail: str | None = None
    forms: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    captions: dict[str, str] = dataclasses.field(default_factory=dict)
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    preference: Preference | None = None
    mask: bytes | None = None
    mask_marks: str = "white"

    @property
    def task(self) -> str:
        """'preference' for two results of one instruction, 'edit' for a triplet, else 'generate'."""
        if self.preference is not None:
            return "preference"
        return "edit" if {"source", "target"} & set(self.images) or "instruction" in self.metadata else "generate"


class Source(Protocol):
    """Where units come from. Listing must be cheap: nothing is decoded."""

    name: str

    def units(self, digests: DigestCache) -> Iterator[Unit]: ...


def read_sidecar(record: Record, suffix: str, payload: bytes) -> None:
    """Add a caption (.txt) or metadata (.json) member to `record`; what cannot be read becomes a note, not an error."""
    if suffix in CAPTION_SUFFIXES:
        try:
            record.caption = payload.decode("utf-8").strip("\ufeff \t\r\n") or None
            if record.caption is None:
                record.notes.append("caption_empty")
            elif "\x00" in record.caption:
                record.caption = None
                record.notes.append("caption_not_text")
        except UnicodeDecodeError as error:
            record.notes.append("caption_not_utf8")
            record.detail = f"caption: {error}"
        return
    try:
        fields = json.loads(payload)
        if not isinstance(fields, dict):
            raise ValueError(f"a JSON {type(fields).__name__}, not an object")
        json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair is legal JSON but no text
        record.metadata |= fields
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        record.notes.append("metadata_invalid")
        record.detail = f"metadata: {error}"


def finish(record: Record) -> Record:
    """Check that `record` is whole: sets `error` where an image is missing, notes where its text is."""
    caption = record.metadata.get("caption")
    if record.caption is None and isinstance(caption, str) and caption.strip():
        record.caption = caption.strip()
    if record.error:
        return record
    roles = {"edit": ("source", "target"), "preference": ("source", "left", "right")}.get(record.task, ())
    if roles:
        missing = [role for role in roles if role not in record.images]
        instruction = record.metadata.get("instruction")
        if missing:
            record.error, record.detail = f"missing_{missing[0]}", f"the {_NAMES[record.task]} has no {' and no '.join(missing)} image"
        elif not (isinstance(instruction, str) and instruction.strip()):
            record.error = "missing_instruction"
            record.detail = record.detail or f"the {_NAMES[record.task]}'s metadata holds no instruction"
    elif not record.images:
        record.error, record.detail = "missing_image", record.detail or "a caption or metadata without an image"
    elif record.caption is None and not any(note.startswith("caption_") for note in record.notes):
        record.notes.append("missing_sidecar")
    return record


def hidden(path: Path) -> bool:
    """Whether a path below a source's folder is one of those that a listing leaves out: a part of it begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def over_limit(size_bytes: int, limits: IngestSettings) -> str | None:
    """Why a file of this size is not read, or None."""
    if size_bytes > limits.max_member_mb * 2**20:
        return f"{size_bytes / 2**20:.0f} MB is over the limit of {limits.max_member_mb} MB a file"
    return None
