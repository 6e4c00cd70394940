"""Candidates of a policy, joined once and kept as a file until anything they could read has changed.
Joining a million records costs seconds, and a changed threshold changes none of them: it re-reads this file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from dreamlite_data import schema
from dreamlite_data.lake import Lake
from dreamlite_data.policies.policy import Policy, parameters_of

# Runs and verdicts are written all the time and are nobody's candidates; rows of a dataset version never change.
_UNREAD = (*schema.TRACKING, *schema.DATASETS)


def candidates_sql(lake: Lake, policy: Policy, parameters: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """SQL for the candidates of `policy`, sorted by row_id where they were kept as a file, and the parameters that it takes.
    A lake opened read-only is read as it is."""
    used = {name: parameters[name] for name in sorted(parameters_of(policy.candidates))}
    folder = lake.files / "candidates"
    path = folder / f"{policy.dataset}-{_key(lake, policy, used)}.parquet"
    if not path.exists():
        if lake.read_only:
            return f"({policy.candidates})", used
        _write(lake, policy, used, path)
    return f"read_parquet('{_quoted(path)}')", {}


def _write(lake: Lake, policy: Policy, used: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    lake.query(
        f"COPY (SELECT * FROM ({policy.candidates}) ORDER BY row_id) TO '{_quoted(draft)}' (FORMAT parquet, COMPRESSION lz4_raw)", used
    )
    for old in path.parent.glob(f"{policy.dataset}-*.parquet"):
        old.unlink(missing_ok=True)  # whoever reads it at this moment keeps it open
    draft.replace(path)


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def _key(lake: Lake, policy: Policy, used: dict[str, Any]) -> str:
    """Of everything that can change a candidate: the SQL, its parameters, the views, and the last commit to a table that
    policies read."""
    metadata = "__ducklake_metadata_lake"
    ids = lake.query(f"SELECT table_id FROM {metadata}.ducklake_table WHERE list_contains($names, table_name)", {"names": list(_UNREAD)})
    unread = f"\\w+:({'|'.join(str(number) for number in sorted(ids['table_id'].to_pylist()))})"
    state = lake.query(
        f"SELECT max(snapshot_id) AS last, (SELECT value FROM lake_info WHERE key = 'views') AS views "
        f"FROM {metadata}.ducklake_snapshot_changes WHERE NOT regexp_full_match(changes_made, $unread)",
        {"unread": f"{unread}(,{unread})*"},
    ).to_pylist()[0]
    content = json.dumps([re.sub(r"\s+", " ", policy.candidates), used, state], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:24]
