"""Which licence a published row stands under, and whether that lets it be passed on.
The rules are data (`licences.yaml`); a row whose licence nobody stated is treated as one that may not be passed on."""

from __future__ import annotations

import dataclasses
import functools
from importlib import resources

import pyarrow as pa
import yaml

from dreamlite_data.lake import Lake

MADE_OF_DEPTH = 8
"""Edits of edits of ... : how many steps a made image is followed back to images that a source brought."""


@dataclasses.dataclass(frozen=True)
class Licence:
    """`name` as in the card, `hub` as in its front matter; `publish` False with the reason in `why`."""

    name: str
    hub: str
    publish: bool
    why: str = ""


UNKNOWN = Licence("unknown", "unknown", False, "no source states a licence that is known")


@functools.cache
def _rules() -> tuple[tuple[tuple[str, ...], Licence], ...]:
    text = resources.files("dreamlite_data.publishing").joinpath("licences.yaml").read_text(encoding="utf-8")
    return tuple(
        (tuple(rule["names"]), Licence(rule["id"], rule["hub"], rule["publish"], rule.get("why", ""))) for rule in yaml.safe_load(text)
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
        "WITH RECURSIVE own AS (SELECT DISTINCT row_id, split_part(row_id, '#', 1) AS record_id FROM r), "
        "by_record AS (SELECT o.row_id, p.licence, p.source FROM own o JOIN provenance p ON p.record_id = o.record_id), "
        "shown AS (SELECT row_id, image_id FROM r UNION SELECT row_id, source_image_id FROM r WHERE source_image_id IS NOT NULL), "
        "walk(row_id, image_id, depth) AS ("
        "  SELECT s.row_id, s.image_id, 0 FROM shown s ANTI JOIN by_record b ON b.row_id = s.row_id UNION "
        "  SELECT w.row_id, CASE WHEN e.target_image_id = w.image_id THEN e.source_image_id ELSE e.target_image_id END, w.depth + 1 "
        "  FROM walk w JOIN edits e ON e.route <> 'provider' AND (e.target_image_id = w.image_id OR e.source_image_id = w.image_id) "
        f" WHERE w.depth < {MADE_OF_DEPTH} AND w.image_id NOT IN (SELECT image_id FROM provenance)), "
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
