"""Which split a row belongs to: a picture, its near-duplicates and all that was made from it share one, in every dataset and version.
A split is drawn from the hash of the group's name, so rows that come later move nobody."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from dreamlite_data.lake import Lake

TRAIN = "train"
HELDOUT = "heldout"
_ORDER = (TRAIN, "validation", "test")

# A group is derived where a provider's edit leads to it from another group, as the second turn of a session does: it belongs to the
# groups that no edit leads to. What our own routes make has the photo's group as it is.
_ROOTS = """
WITH RECURSIVE links AS (
    SELECT DISTINCT coalesce(s.group_id, e.source_image_id) AS parent, coalesce(t.group_id, e.target_image_id) AS child
    FROM edits e
    LEFT JOIN current_duplicates s ON s.subject_id = e.source_image_id
    LEFT JOIN current_duplicates t ON t.subject_id = e.target_image_id
    WHERE e.route = 'provider' AND coalesce(e.relation, '') <> 'inverse' AND parent <> child
),
walk(child, ancestor) AS (
    SELECT child, parent FROM links SEMI JOIN named ON named.name = links.child
    UNION
    SELECT w.child, l.parent FROM walk w JOIN links l ON l.child = w.ancestor
)
SELECT child, coalesce(min(ancestor) FILTER (ancestor NOT IN (SELECT child FROM links)), least(child, min(ancestor))) AS root
FROM walk GROUP BY child
"""


def split_shares(parameters: Mapping[str, Any]) -> dict[str, float]:
    """{split: share} that the parameters of a policy ask for: those they name, else train and heldout."""
    return dict(parameters.get("splits") or {TRAIN: 1 - parameters["heldout_share"], HELDOUT: parameters["heldout_share"]})


def with_split(lake: Lake, kept: pa.Table, parameters: Mapping[str, Any]) -> pa.Table:
    """`kept` (group_id, row_id, ...) with the column split. The first 64 bits of the hash of a group's name fall below the shares, added
    up, of the splits other than train in their order; train has the rest. A row without group is one of its own. Edits of edits
    are followed back to the first picture."""
    shares, edges, total = split_shares(parameters), [], 0.0
    for name, share in shares.items():
        if name != TRAIN:
            total += share
            edges.append((name, f"{int(total * 2**64):016x}"))
    names = lake.query("SELECT coalesce(nullif(group_id, ''), row_id) AS name FROM kept", kept=kept.select(["group_id", "row_id"]))
    names = lake.query(
        "SELECT coalesce(r.root, n.name) AS name FROM named n LEFT JOIN roots r ON r.child = n.name ORDER BY n.place",
        named=names.append_column("place", pa.array(range(len(names)), pa.int64())),
        roots=lake.query(_ROOTS, named=names),
    )
    cases = " ".join(f"WHEN sha256('split:' || name)[:16] < $below_{number} THEN $name_{number}" for number in range(len(edges)))
    values = {f"{what}_{number}": value for number, edge in enumerate(edges) for what, value in zip(("name", "below"), edge, strict=True)}
    split = lake.query(f"SELECT CASE {cases} ELSE '{TRAIN}' END AS split FROM names", values, names=names)
    return kept.append_column("split", split["split"])


def split_order(name: str) -> tuple[int, str]:
    """Sorts names of splits: train, validation, test, then the rest by name."""
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)
