"""Which licence a published row stands under, and whether that lets it be passed on.
The rules are data (`licences.yaml`); a row whose licence nobody stated is treated as one that may not be passed on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from importlib import resources

import pyarrow as pa
import yaml

from dreamlite_data.lake import Lake
from dreamlite_data.publishing.materials import WALK


@dataclasses.dataclass(frozen=True)
class Licence:
    """`name` as in the card, `hub` as in its front matter; `publish` False with the reason in `why`. `strict` orders what it asks;
    `takes` names the licences of works that may be part of one under it, where it wants the whole under itself."""

    name: str
    hub: str
    publish: bool
    why: str = ""
    strict: int = 0
    takes: tuple[str, ...] = ()


UNKNOWN = Licence("unknown", "unknown", False, "no source states a licence that is known")


@functools.cache
def _rules() -> tuple[tuple[tuple[str, ...], Licence], ...]:
    text = resources.files("dreamlite_data.publishing").joinpath("licences.yaml").read_text(encoding="utf-8")
    return tuple(
        (
            tuple(rule["names"]),
            Licence(rule["id"], rule["hub"], rule["publish"], rule.get("why", ""), rule.get("strict", 0), tuple(rule.get("takes", ()))),
        )
        for rule in yaml.safe_load(text)
    )


def find_licence(stated: str | None) -> Licence:
    """The licence that a source's words mean; UNKNOWN for none and for words that no rule knows."""
    words = " ".join((stated or "").lower().replace("_", "-").split())
    for names, licence in _rules():
        for name in names:
            if words.startswith(name) and not words[len(name) :][:1].isalpha():
                return licence
    return UNKNOWN


def row_licences(lake: Lake, rows: pa.Table) -> list[list[str | None]]:
    """The licences that the sources state for each of `rows` (row_id, image_id, source_image_id), sorted and each once.
    A row that a source brought stands under its own record's licences; any other under those of every image it shows, and a made
    image under those of what it was made from. Empty where no origin is known."""
    found = lake.query(
        f"WITH RECURSIVE {WALK}, "
        "by_image AS (SELECT w.row_id, p.licence, p.source FROM walk w JOIN provenance p ON p.image_id = w.image_id) "
        "SELECT row_id, list(DISTINCT coalesce(licence, '')) AS licences FROM (FROM by_record UNION ALL FROM by_image) GROUP BY row_id",
        r=rows.select(["row_id", "image_id", "source_image_id"]),
    )
    by_row = dict(zip(found["row_id"].to_pylist(), found["licences"].to_pylist(), strict=True))
    return [[text or None for text in sorted(by_row.get(row_id, []))] for row_id in rows["row_id"].to_pylist()]


def strictest(stated: list[str | None]) -> Licence:
    """The licence that decides about a row: one that forbids publishing it where there is any, else the first by name."""
    licences = sorted({find_licence(text) for text in stated} or {UNKNOWN}, key=lambda licence: (licence.publish, licence.name))
    return licences[0]


def combined(licences: Iterable[Licence]) -> Licence:
    """The licence of one picture put together from works under these (at least one): the strictest, where it takes the others; one that
    may not be published where any of them may not, or where no licence fits the whole."""
    found = sorted(set(licences), key=lambda licence: (licence.publish, -licence.strict, licence.name))
    if len(found) == 1 or not found[0].publish:
        return found[0]
    wanting = [licence for licence in found if licence.takes]
    if not wanting:
        return found[0]
    for licence in wanting:
        if all(other.name in licence.takes for other in found if other != licence):
            return licence
    return Licence(" + ".join(licence.name for licence in found), "other", False, "the terms of its parts exclude each other")
