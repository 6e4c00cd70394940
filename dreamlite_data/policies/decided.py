"""What people decided about a lake outside its settings, as digests: an orchestrator adds them to what decides a curation,
so that a committed policy or a forgotten image makes it run again."""

from __future__ import annotations

import hashlib
import json

from dreamlite_data.lake import Lake

TABLES = {
    # With the position: a policy that comes back after a reset is a new decision, and makes a new version.
    "policies": "SELECT name, max(position) AS position, arg_max(coalesce(digest, ''), position) AS digest FROM policies "
    "GROUP BY name ORDER BY name",
    "takedowns": "SELECT DISTINCT takedown_id FROM takedowns ORDER BY takedown_id",
}


def decided(lake: Lake) -> dict[str, str]:
    """{'policies': digest, 'takedowns': digest} of those there are. A lake of an older version has neither."""
    have = set(lake.query("SELECT table_name FROM duckdb_tables() WHERE database_name = 'lake'")["table_name"].to_pylist())
    rows = {name: lake.query(sql).to_pylist() for name, sql in TABLES.items() if name in have}
    return {name: hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] for name, found in rows.items() if found}
