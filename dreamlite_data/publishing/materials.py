"""What pictures of a row were put together from, besides photos: the cut-outs in them, each with its origin and licence.
Followed through edits of edits, so that nothing pasted in is lost on the way to a publication."""

from __future__ import annotations

import dataclasses

import pyarrow as pa

from dreamlite_data.lake import Lake

MADE_OF_DEPTH = 8
"""Edits of edits of ... : how many steps a made image is followed back to images that a source brought."""

WALK = f"""
own AS (SELECT DISTINCT row_id, split_part(row_id, '#', 1) AS record_id FROM r),
by_record AS (SELECT o.row_id, p.licence, p.source FROM own o JOIN provenance p ON p.record_id = o.record_id),
shown AS (SELECT row_id, image_id FROM r UNION SELECT row_id, source_image_id FROM r WHERE source_image_id IS NOT NULL),
links AS (
    SELECT target_image_id AS here, source_image_id AS there FROM edits WHERE route <> 'provider'
    UNION ALL SELECT source_image_id, target_image_id FROM edits WHERE route <> 'provider'
    UNION ALL SELECT unnest([e.source_image_id, e.target_image_id]), o.subject_id
    FROM (SELECT subject_id, unnest(edit_ids) AS edit_id FROM op_edit) o JOIN edits e ON e.edit_id = o.edit_id
),
walk(row_id, image_id, depth) AS (
    SELECT s.row_id, s.image_id, 0 FROM shown s ANTI JOIN by_record b ON b.row_id = s.row_id
    UNION
    SELECT w.row_id, l.there, w.depth + 1 FROM walk w JOIN links l ON l.here = w.image_id
    WHERE w.depth < {MADE_OF_DEPTH} AND w.image_id NOT IN (SELECT image_id FROM provenance)
)
"""
"""CTEs over rows `r` (row_id, image_id, source_image_id): the images of a row, and for made ones those on the way back to what a source
brought: through their edits, and to the photo that a route worked on, for things may have been pasted onto both of its pictures. A
row that a source brought itself has its record and no walk."""


@dataclasses.dataclass(frozen=True, order=True)
class Material:
    """A cut-out in a picture: its name, the set that it is from, and its licence as stated ('' where nobody states one)."""

    origin: str
    name: str
    licence: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.name} ({self.licence or 'unknown'})"


def row_materials(lake: Lake, rows: pa.Table) -> list[list[Material]]:
    """The cut-outs in the pictures of each of `rows` (row_id, image_id, source_image_id), sorted. A composite of which the lake does not
    know the cut-outs, as one of an older version may be, has one of unknown name and licence."""
    found = lake.query(
        f"WITH RECURSIVE {WALK}, "
        "made AS (SELECT DISTINCT w.row_id, e.edit_id, e.route FROM walk w JOIN edits e ON e.route <> 'provider' AND "
        "(e.target_image_id = w.image_id OR e.source_image_id = w.image_id) WHERE w.image_id NOT IN (SELECT image_id FROM provenance) "
        "UNION SELECT r.row_id, e.edit_id, e.route FROM r JOIN edits e ON e.edit_id = r.row_id WHERE e.route <> 'provider'), "
        "named AS (SELECT m.row_id, m.route, unnest(coalesce(p.cutout_ids, [NULL])) AS cutout_id FROM made m LEFT JOIN edit_parts p "
        "ON p.edit_id = m.edit_id WHERE p.edit_id IS NOT NULL OR m.route = 'composite') "
        "SELECT DISTINCT n.row_id, coalesce(c.origin, 'unknown') AS origin, coalesce(c.name, n.cutout_id, 'a cut-out') AS name, "
        "coalesce(c.licence, '') AS licence FROM named n LEFT JOIN cutouts c ON c.cutout_id = n.cutout_id",
        r=rows.select(["row_id", "image_id", "source_image_id"]),
    )
    by_row: dict[str, list[Material]] = {}
    for row in found.to_pylist():
        by_row.setdefault(row["row_id"], []).append(Material(row["origin"], row["name"], row["licence"]))
    return [sorted(by_row.get(row_id, [])) for row_id in rows["row_id"].to_pylist()]
