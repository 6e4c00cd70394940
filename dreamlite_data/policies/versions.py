"""What is known about dataset versions: the list of them, the rules each was made by, and why two of them differ.
All of it is read from the lake; nothing here writes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pyarrow as pa

from dreamlite_data.dataset import DatasetError, open_dataset
from dreamlite_data.lake import Lake
from dreamlite_data.policies.splits import split_order


@dataclasses.dataclass(frozen=True)
class VersionDiff:
    """From version `before` to `after`. `rows` has row_id, change ('added', 'removed' or 'changed'), rule and margin: what kept an
    added row out before, what puts a removed one out now; for a changed row, the columns that differ. `rules` lists
    (rule, body and parameters before, the same after), None where a version has no such rule."""

    name: str
    before: int
    after: int
    rows: pa.Table
    rules: list[tuple[str, str | None, str | None]]

    def counts(self) -> dict[str, int]:
        """Rows by kind of change."""
        changes = self.rows["change"].to_pylist()
        return {kind: changes.count(kind) for kind in ("added", "removed", "changed")}


def list_versions(lake: Lake) -> list[dict[str, Any]]:
    """Every dataset version: dataset, version, rows, splits ('train 950, heldout 50'), parent, snapshot, policy ('committed' where its
    newest policy is a user's), digest; newest first within a name."""
    found = lake.query(
        "WITH own AS (SELECT name, arg_max(coalesce(text, ''), position) <> '' AS held FROM policies GROUP BY name) "
        "SELECT d.name AS dataset, d.version, d.rows, d.parent, d.snapshot, "
        "CASE WHEN o.held AND d.version = max(d.version) OVER (PARTITION BY d.name) THEN 'committed' ELSE '' END AS policy, "
        "d.digest[:12] AS digest FROM datasets d LEFT JOIN own o ON o.name = d.name ORDER BY d.name, d.version DESC"
    ).to_pylist()
    splits: dict[tuple[str, int], dict[str, int]] = {}
    for row in lake.query("SELECT name, version, split, count(*) AS n FROM dataset_rows GROUP BY ALL").to_pylist():
        splits.setdefault((row["name"], row["version"]), {})[str(row["split"])] = row["n"]
    answer = []
    for row in found:
        counts = splits.get((row["dataset"], row["version"]), {})
        said = ", ".join(f"{split} {counts[split]:,}" for split in sorted(counts, key=split_order))
        answer.append({"dataset": row["dataset"], "version": row["version"], "rows": row["rows"], "splits": said, **row})
    return answer


def stored_rules(lake: Lake, name: str, version: int | None = None) -> tuple[int, list[dict[str, Any]]]:
    """The rules that made a version (the newest by default), in order: rule, body, and the parameters that the body reads."""
    found = open_dataset(lake, name, version)
    rows = lake.query(
        "SELECT position, rule, body, parameters FROM policy_rules WHERE dataset = $name AND version = $version ORDER BY position",
        {"name": name, "version": found.version},
    ).to_pylist()
    for row in rows:
        values = json.loads(row["parameters"] or "{}")
        row["parameters"] = ", ".join(f"{key}={values[key]}" for key in sorted(values) if f"${key}" in row["body"])
    return found.version, [{"rule": row["rule"], "body": " ".join(row["body"].split()), "parameters": row["parameters"]} for row in rows]


def diff_versions(lake: Lake, name: str, before: int | None = None, after: int | None = None) -> VersionDiff:
    """What changed from `before` (by default the version that `after` was made from) to `after` (by default the newest)."""
    newest = open_dataset(lake, name, after).version
    if before is None:
        parent = lake.query("SELECT parent FROM datasets WHERE name = $n AND version = $v", {"n": name, "v": newest})["parent"][0].as_py()
        if parent is None:
            raise DatasetError(f"dataset {name}@{newest} has no parent: name the version to compare it with")
        before = parent
    before = open_dataset(lake, name, before).version
    columns = ("task", "image_id", "source_image_id", "text", "edit_type", "edited_fraction", "edit_mask", "weight", "split")
    differs = ", ".join(f"CASE WHEN a.{column} IS DISTINCT FROM b.{column} THEN '{column}' END" for column in columns)
    rows = lake.query(
        "WITH a AS (SELECT * FROM dataset_rows WHERE name = $name AND version = $before), "
        "b AS (SELECT * FROM dataset_rows WHERE name = $name AND version = $after), "
        "da AS (SELECT * FROM decisions WHERE dataset = $name AND version = $before), "
        "db AS (SELECT * FROM decisions WHERE dataset = $name AND version = $after) "
        "SELECT b.row_id, 'added' AS change, coalesce(da.first_rule, 'not offered before') AS rule, da.margin "
        "FROM b ANTI JOIN a ON a.row_id = b.row_id LEFT JOIN da ON da.row_id = b.row_id "
        "UNION ALL SELECT a.row_id, 'removed', coalesce(db.first_rule, 'not offered now'), db.margin "
        "FROM a ANTI JOIN b ON b.row_id = a.row_id LEFT JOIN db ON db.row_id = a.row_id "
        f"UNION ALL SELECT a.row_id, 'changed', array_to_string(list_filter([{differs}], x -> x IS NOT NULL), ', ') AS what, NULL "
        f"FROM a JOIN b ON b.row_id = a.row_id WHERE len(list_filter([{differs}], x -> x IS NOT NULL)) > 0 ORDER BY ALL",
        {"name": name, "before": before, "after": newest},
    )
    return VersionDiff(name, before, newest, rows, _changed_rules(lake, name, before, newest))


def _changed_rules(lake: Lake, name: str, before: int, after: int) -> list[tuple[str, str | None, str | None]]:
    old, new = (
        {
            row["rule"]: row["body"] + (f"  [{row['parameters']}]" if row["parameters"] else "")
            for row in stored_rules(lake, name, version)[1]
        }
        for version in (before, after)
    )
    return [(rule, old.get(rule), new.get(rule)) for rule in dict.fromkeys([*old, *new]) if old.get(rule) != new.get(rule)]
