"""Grade the filters: which planted faults each one caught, and how many clean rows it failed.
The truth lies beside the shards in a file that no operator and no policy ever reads."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from dreamlite_data.lake import Lake
from dreamlite_data.settings import RefreshSettings

CAUGHT_BY = {
    "truncated": ("ingested",),
    "zero_bytes": ("ingested",),
    "duplicate": ("unique_image", "unique_triplet"),
    "blurred": ("sharp",),
    "wrong_caption": ("caption_matches_image",),
    "wrong_edit": ("edit_matches_instruction", "something_changed", "change_is_local"),
}
"""Which rules are meant to catch a fault. Rows that never became images fail every rule, but only count for the first."""


def fault_report(lake: Lake, settings: RefreshSettings) -> list[dict[str, Any]]:
    """One row per fault: fault, planted, caught, false_positives (clean rows that its rules failed), precision, recall.
    Precision counts a row as rightly failed where it carries this very fault."""
    from dreamlite_data.refresh import source_list

    files = lake.files / "sources"
    worlds = {source.name.rpartition("_")[0] for source in source_list(lake, settings) if source.domain == "scenes"}
    truth = [row for world in sorted(worlds) for row in json.loads((files / f"{world}.truth.json").read_text())]
    planted = pa.table({
        "row_id": pa.array([f"{row['source']}/{row['shard']}/{row['source_key']}" for row in truth], pa.string()),
        "fault": pa.array([row["fault"] for row in truth], pa.string()),
    })  # fmt: skip
    judged = lake.query(
        "SELECT d.row_id, p.fault, d.failed FROM decisions d JOIN latest_datasets l ON l.name = d.dataset AND l.version = d.version "
        "LEFT JOIN planted p ON p.row_id = d.row_id "
        "WHERE d.dataset IN ('t2i', 'edit') AND NOT ends_with(d.row_id, '#scene') AND "
        "d.row_id IN (SELECT subject_id FROM current_ingest WHERE domain = 'scenes')",
        planted=planted,
    ).to_pylist()
    report = []
    for fault, rules in CAUGHT_BY.items():
        of_fault = [row for row in judged if row["fault"] == fault]
        caught = sum(bool(set(rules) & _blamed(row)) for row in of_fault)
        false_positives = sum(row["fault"] is None and bool(set(rules) & _blamed(row)) for row in judged)
        count = sum(row["fault"] == fault for row in truth)
        report.append({
            "fault": fault, "planted": count, "caught": caught, "false_positives": false_positives,
            "precision": caught / (caught + false_positives) if caught + false_positives else None,
            "recall": caught / count if count else None,
        })  # fmt: skip
    return report


def _blamed(row: dict[str, Any]) -> set[str]:
    failed = set(row["failed"] or ())
    return {"ingested"} if "ingested" in failed else failed
