"""Turn the rows of any table into records by a mapping: one row gives one record, or two where the way back has words, or one a turn.
Image values may be bytes, {bytes, path}, a path below a given root, or a URL that was downloaded."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dreamlite_data.settings import IngestSettings
from dreamlite_data.sources import mapping as mappings
from dreamlite_data.sources.base import Preference, Record, finish, over_limit

ROLE_OF = {"image": ""}
"""Mapping name -> role in a record, where the two differ."""
_SCORES = ("left_follow", "right_follow", "left_quality", "right_quality")


class ImageUnavailable(Exception):
    """An image value leads to no bytes; carries the reason to group by and a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class ImageStore:
    """Where image paths lead: below `root`, or, for URLs, to the file that `downloaded` names; a URL that failed has its reason there
    as 'error:...'. Without a root no path is followed."""

    root: str | None
    limits: IngestSettings
    downloaded: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def read(self, value: Any) -> bytes | None:
        """Bytes of one image value; None where the row has none. Raises ImageUnavailable."""
        if isinstance(value, (list, tuple)):
            if len(value) > 1:
                raise ImageUnavailable("several_images", f"{len(value)} images where one is wanted: give an index in the mapping")
            value = value[0] if value else None
        if isinstance(value, dict):
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if value is None or value == "":
            return None
        if isinstance(value, (bytes, bytearray, memoryview)):
            problem = over_limit(len(value), self.limits)
            if problem:
                raise ImageUnavailable("too_large", problem)
            return bytes(value)
        if not isinstance(value, str):
            raise ImageUnavailable("not_an_image", f"a value of type {type(value).__name__} is neither bytes nor a path")
        return self.read_url(value) if is_url(value) else self._read_path(value)

    def read_url(self, url: str) -> bytes:
        """Bytes of the file that a URL led to. Raises ImageUnavailable."""
        found = self.downloaded.get(url)
        if found is None:
            raise ImageUnavailable("not_downloaded", f"{url} was not downloaded")
        if found.startswith("error:"):
            reason, _, detail = found.removeprefix("error:").partition(":")
            raise ImageUnavailable(reason, f"{url}: {detail}")
        return self._read_file(Path(found))

    def _read_path(self, text: str) -> bytes:
        if self.root is None:
            raise ImageUnavailable("missing_image_file", f"the path {text!r} has no folder to start from: set image_root")
        root = Path(self.root).resolve()
        try:
            path = (root / text).resolve()
            if not path.is_relative_to(root):
                raise ImageUnavailable("unsafe_path", f"the path {text!r} leads out of {root}")
        except (ValueError, OSError) as error:  # a null byte, a loop of links
            raise ImageUnavailable("unsafe_path", f"the path {text!r} cannot be followed: {error}") from None
        return self._read_file(path)

    def _read_file(self, path: Path) -> bytes:
        try:
            problem = over_limit(path.stat().st_size, self.limits)
            if problem:
                raise ImageUnavailable("too_large", problem)
            return path.read_bytes()
        except FileNotFoundError:
            raise ImageUnavailable("missing_image_file", f"there is no file {path}") from None
        except OSError as error:
            raise ImageUnavailable("unreadable", str(error)) from None


def is_url(value: Any) -> bool:
    """Whether an image value is a web address."""
    return isinstance(value, str) and value.lower().startswith(("http://", "https://"))


def image_values(mapping: mappings.Mapping, row: dict[str, Any]) -> Iterator[Any]:
    """Every image value that `records` will ask for; what a listing needs to digest files and to know URLs."""
    for part in _unrolled(mapping, row):
        for column in [*mapping.images.values(), *([mapping.mask.column] if mapping.mask else [])]:
            value = mappings.lookup(part, column)
            value = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
            value = value.get("path") if isinstance(value, dict) and value.get("bytes") is None else value
            if value is not None:
                yield value


def records(mapping: mappings.Mapping, key: str, row: dict[str, Any], images: ImageStore) -> list[Record]:
    """The records of one row, whole or with the reason why not. `key` names the row within its unit."""
    own = mappings.lookup(row, mapping.key) if mapping.key else None
    key = f"{key}:{own}" if own is not None else key
    try:
        parts = list(_unrolled(mapping, row))
    except ValueError as error:
        return [Record(key=key, error="bad_row", detail=str(error))]
    found: list[Record] = []
    for number, part in enumerate(parts, start=1):
        found += _part(mapping, f"{key}#{number}" if mapping.unroll else key, key, part, images)
    return found


def _unrolled(mapping: mappings.Mapping, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if mapping.unroll is None:
        yield row
        return
    items = mappings.lookup(row, (mapping.unroll,))
    if not isinstance(items, (list, tuple)) or not items:
        raise ValueError(f"the column {mapping.unroll!r} holds no list to unroll")
    for turn, item in enumerate(items, start=1):
        yield {**row, "turn": turn, "previous": turn - 1, **(item if isinstance(item, dict) else {"item": item})}


def _part(mapping: mappings.Mapping, key: str, row_key: str, row: dict[str, Any], images: ImageStore) -> list[Record]:
    record = Record(key=_clean(key))
    _add_images(mapping, record, row, images)
    _add_words(mapping, record, row, row_key)
    _add_numbers(mapping, record, row)
    found = [finish(record)]
    back = _text(mappings.lookup(row, mapping.inverse_instruction)) if mapping.inverse_instruction else None
    if back is not None:
        found.append(finish(_inverse(record, back)))
    return found


def _add_images(mapping: mappings.Mapping, record: Record, row: dict[str, Any], images: ImageStore) -> None:
    for name, column in mapping.images.items():
        try:
            payload = images.read(mappings.lookup(row, column))
        except ImageUnavailable as problem:
            record.error, record.detail = problem.reason, f"{name}: {problem.detail}"
            continue
        if payload is not None:
            record.images[ROLE_OF.get(name, name)] = payload
    if mapping.mask is not None:
        record.mask_marks = mapping.mask.marks
        try:
            record.mask = images.read(mappings.lookup(row, mapping.mask.column))
        except ImageUnavailable as problem:  # the triplet is whole without it
            record.notes.append(f"mask_{problem.reason}")


def _add_words(mapping: mappings.Mapping, record: Record, row: dict[str, Any], row_key: str) -> None:
    take = {name: _text(mappings.lookup(row, getattr(mapping, name))) for name in ("instruction", "caption", "url", "edit_type", "session")}
    record.caption = take["caption"]
    if mapping.task != "generate":
        # A triplet without its images must still be the failure of a triplet: the key alone marks the task.
        record.metadata["instruction"] = take["instruction"]
        if take["edit_type"] is not None:
            record.metadata["edit_type"] = mapping.edit_types.get(take["edit_type"], take["edit_type"])
        turn = mappings.lookup(row, mapping.turn)
        if mapping.session or (mapping.unroll and turn is not None):
            record.metadata["session_id"] = take["session"] or row_key
            record.metadata["turn"] = int(number) if (number := _number(turn)) is not None else None
    record.metadata["url"] = take["url"]
    record.metadata["licence"] = _text(mappings.lookup(row, mapping.licence_column))
    place = _text(mappings.lookup(row, mapping.origin_column))
    record.metadata["origin"] = "/".join(filter(None, (mapping.origin, place))) if place else None  # else the unit knows it
    for role, column in mapping.captions.items():
        words = _text(mappings.lookup(row, column))
        if words is not None:
            record.captions[role] = words
    for form, column in mapping.forms.items():
        words = _text(mappings.lookup(row, column))
        if words is not None and words != take["instruction"]:
            record.forms.append((form, words))
    canary = _text(mappings.lookup(row, mapping.canary))
    if canary is not None:
        record.notes.append(f"canary {canary}")


def _add_numbers(mapping: mappings.Mapping, record: Record, row: dict[str, Any]) -> None:
    for name, column in mapping.scores.items():
        values = _numbers(mappings.lookup(row, column))
        for index, value in enumerate(values, start=1):
            record.scores[name if len(values) == 1 else f"{name}_{index}"] = value
    if mapping.task == "preference":
        given = {name: mappings.lookup(row, column) for name, column in mapping.preference.items()}
        vote = _text(given.get("vote"))
        record.preference = Preference(
            vote=mapping.votes.get(vote, vote) if vote is not None else None,
            left_model=_text(given.get("left_model")),
            right_model=_text(given.get("right_model")),
            **{name: _number(given.get(name)) for name in _SCORES},
        )


def _inverse(record: Record, words: str) -> Record:
    """The way back. Neither the provider's scores nor its mask and other wordings were made for it."""
    exchange = {"source": "target", "target": "source"}
    metadata = {name: value for name, value in record.metadata.items() if name != "edit_type"}
    return Record(
        key=f"{record.key}#inverse",
        images={exchange[role]: payload for role, payload in record.images.items()},
        captions={exchange[role]: text for role, text in record.captions.items()},
        metadata=metadata | {"instruction": words, "relation": "inverse", "inverse_of": record.metadata["instruction"]},
        error=record.error,
        detail=record.detail,
    )


def _text(value: Any) -> str | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    return _clean(value).strip() or None if isinstance(value, str) else None


def _clean(text: str) -> str:
    """Half a surrogate pair is legal JSON but no text."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\x00", "\\x00")


def _number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def _numbers(value: Any) -> list[float]:
    """Numbers of a score column: one, a list, or a list written as text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return []
    values = value if isinstance(value, (list, tuple)) else [value]
    return [number for item in values if (number := _number(item)) is not None]
