"""Decide: run each policy over its candidates, keep every verdict, and freeze the kept rows as a dataset version.
The same rows under the same policy are the same version, however often this runs."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pyarrow as pa

from dreamlite_data import schema
from dreamlite_data.lake import Lake, insert
from dreamlite_data.policies.committed import check_sql, committed_policies
from dreamlite_data.policies.policy import REQUIRED_COLUMNS, Policy, Rule, read_policy

DATASETS = ("t2i", "edit", "photos", "photo_edits", "sft", "rl")
"""In the order in which they are made: later ones draw from earlier ones."""
# From how many rows on a unanimous rule is a surprise: a rare fault can be absent from hundreds of rows, but a rule that
# rejects the first fifty rejects everything.
PASS_ALL_ROWS = 1000
REJECT_ALL_ROWS = 50
ROW_COLUMNS = ("row_id", *REQUIRED_COLUMNS[1:], "split")


class CurationError(RuntimeError):
    """A policy gave an answer that cannot be meant: the message says which rule, and how to mend or allow it."""


def curate(lake: Lake, parameters: dict[str, Any], datasets: tuple[str, ...] = DATASETS) -> list[dict[str, Any]]:
    """Make the current version of each dataset that has candidates; returns name, version, rows, digest of each.
    `parameters` are the policy settings and `sources`, `seed`; `allow_unanimous` lists rules that may be unanimous.
    A policy that a user committed stands in for the packaged one of its name, or adds a dataset of its own."""
    made: dict[str, dict[str, Any]] = {}
    committed = committed_policies(lake)
    for name in (*datasets, *(name for name in committed if name not in DATASETS)):
        own = committed.get(name)
        policy = own.policy if own else read_policy(name)
        parents = drawn_from(policy)
        if any(parent not in made for parent in parents):
            continue
        given = {**parameters, **(own.parameters if own else {}), **{f"{parent}_version": made[parent]["version"] for parent in parents}}
        if own:
            check_sql(lake, policy, given, f"the committed policy {name}")
        judged, outcome = judge(lake, policy, given)
        if not len(judged):
            continue
        _refuse_surprises(policy, outcome, len(judged), given)
        made[name] = freeze(lake, policy, judged, given, [(parent, made[parent]["version"]) for parent in parents])
    return list(made.values())


def drawn_from(policy: Policy) -> tuple[str, ...]:
    """The datasets whose version the policy reads as $<name>_version, in the order in which they are made."""
    names = {name.removesuffix("_version") for name in policy.parameters() if name.endswith("_version")}
    return tuple(sorted(names, key=lambda name: (DATASETS.index(name) if name in DATASETS else len(DATASETS), name)))


def judge(lake: Lake, policy: Policy, parameters: dict[str, Any]) -> tuple[pa.Table, list[tuple[Rule, int, int]]]:
    """Every candidate with its verdict, sorted by row_id, and per rule how many rows reached it and how many failed there.
    Columns: the candidate's own, verdict, first_rule, rule_position, margin, failed. A null measurement does not pass."""
    rules = policy.active(parameters)
    # Only what the rules that are on name: DuckDB refuses a parameter that its query does not have.
    used = {name: parameters[name] for name in Policy(policy.dataset, policy.candidates, tuple(rules)).parameters() & parameters.keys()}
    unknown = policy.parameters() - parameters.keys()
    if unknown:
        raise CurationError(f"policies/{policy.dataset}.sql reads ${', $'.join(sorted(unknown))}, which no setting provides")
    tests = ", ".join(
        f"coalesce(({rule.body}) {'>= 0' if rule.margin else ''}, false) AS pass_{index}, "
        f"{f'CAST(({rule.body}) AS DOUBLE)' if rule.margin else 'CAST(NULL AS DOUBLE)'} AS margin_{index}"
        for index, rule in enumerate(rules)
    )
    first = "CASE " + " ".join(f"WHEN NOT pass_{index} THEN {index}" for index in range(len(rules))) + " END"
    margin = "CASE " + " ".join(f"WHEN NOT pass_{index} THEN margin_{index}" for index in range(len(rules))) + " END"
    name = "CASE " + " ".join(f"WHEN NOT pass_{index} THEN '{rule.name}'" for index, rule in enumerate(rules)) + " END"
    failed = ", ".join(f"CASE WHEN NOT pass_{index} THEN '{rule.name}' END" for index, rule in enumerate(rules))
    sql = (
        f"WITH candidates AS ({policy.candidates}), judged AS (SELECT *, {tests} FROM candidates) "
        f"SELECT * EXCLUDE ({', '.join(f'pass_{index}, margin_{index}' for index in range(len(rules)))}), "
        f"CASE WHEN {first} IS NULL THEN 'keep' ELSE 'drop' END AS verdict, {name} AS first_rule, "
        f"CAST({first} AS INTEGER) AS rule_position, {margin} AS margin, list_filter([{failed}], x -> x IS NOT NULL) AS failed "
        "FROM judged ORDER BY row_id"
    )
    judged = lake.query(sql, used)
    missing = [column for column in REQUIRED_COLUMNS if column not in judged.column_names]
    if missing:
        raise CurationError(f"the candidates of policies/{policy.dataset}.sql lack the columns {', '.join(missing)}")
    positions = judged["rule_position"].to_pylist()
    outcome, reached = [], len(judged)
    for index, rule in enumerate(rules):
        rejected = positions.count(index)
        outcome.append((rule, reached, rejected))
        reached -= rejected
    return judged, outcome


def _refuse_surprises(policy: Policy, outcome: list[tuple[Rule, int, int]], total: int, parameters: dict[str, Any]) -> None:
    found = surprises(policy, outcome, total, parameters)
    if found:
        raise CurationError(found[0])


def surprises(policy: Policy, outcome: list[tuple[Rule, int, int]], total: int, parameters: dict[str, Any]) -> list[str]:
    """A sentence for each rule that was never evaluated, or that passed or rejected everything, and is not allowed to."""
    found = []
    allowed = set(parameters.get("allow_unanimous", ()))
    for rule, reached, rejected in outcome:
        name = f"{policy.dataset}.{rule.name}"
        if allowed & {name, "*"} or rule.allow == "any":
            continue
        if reached == 0 and total >= REJECT_ALL_ROWS:
            said = "was never evaluated: the rules before it rejected every row"
        elif rejected == reached >= REJECT_ALL_ROWS and rule.allow != "reject_all":
            said = f"rejected all {reached} rows that reached it"
        elif rejected == 0 and reached >= PASS_ALL_ROWS and rule.allow != "pass_all":
            said = f"rejected none of {reached} rows"
        else:
            continue
        found.append(
            f"the rule {name} {said}. Look at its measurements (SELECT * FROM why_dropped), correct policies/{policy.dataset}.sql or its "
            f"threshold, or add '{name}' to refresh.policy.allow_unanimous if that is right"
        )
    return found


def split_of(group: str, heldout_share: float) -> str:
    """'heldout' for a share of the groups, by the hash of the group's name: a picture keeps its side in every dataset
    and every version."""
    draw = int.from_bytes(hashlib.sha256(f"split:{group}".encode()).digest()[:8], "big") / 2**64
    return "heldout" if draw < heldout_share else "train"


def rows_digest(rows: pa.Table) -> str:
    """sha256 over the rows in row_id order: what a dataset version is, apart from its number."""
    total = hashlib.sha256()
    for batch in rows.select(ROW_COLUMNS).to_batches(max_chunksize=65536):
        for row in batch.to_pylist():
            row["edit_mask"] = row["edit_mask"].hex() if row["edit_mask"] is not None else None
            total.update(json.dumps(list(row.values()), ensure_ascii=False).encode())
            total.update(b"\n")
    return total.hexdigest()


def freeze(
    lake: Lake, policy: Policy, judged: pa.Table, parameters: dict[str, Any], parents: list[tuple[str, int]]
) -> dict[str, Any]:
    """Keep every verdict, and the kept rows as a new version unless they are those of the newest under the same policy.
    Returns name, version, rows, digest."""
    name = policy.dataset
    kept = judged.filter(pa.compute.equal(judged["verdict"], "keep"))
    if "split" not in kept.column_names:
        groups = kept["group_id"].to_pylist()
        split = [split_of(group or row_id, parameters["heldout_share"]) for group, row_id in zip(groups, kept["row_id"].to_pylist(), strict=True)]
        kept = kept.append_column("split", pa.array(split, pa.string()))
    rows = schema.conform("dataset_rows", kept.select(ROW_COLUMNS))
    digest, policy_digest = rows_digest(rows), policy.digest(parameters)
    latest = lake.query("SELECT * FROM latest_datasets WHERE name = $name", {"name": name}).to_pylist()
    same = latest and (latest[0]["digest"], latest[0]["policy_digest"]) == (digest, policy_digest)
    version = latest[0]["version"] if same else (latest[0]["version"] + 1 if latest else 1)
    decisions = judged.select(["row_id", "image_id", "verdict", "first_rule", "rule_position", "margin", "failed"])
    if same:
        # Rows that came since and were all dropped change no version, but their verdicts are kept like any other.
        decisions = lake.query(
            "SELECT n.* FROM fresh n ANTI JOIN (SELECT row_id FROM decisions WHERE dataset = $name AND version = $version) d "
            "ON d.row_id = n.row_id ORDER BY n.row_id",
            {"name": name, "version": version},
            fresh=decisions,
        )
    tables = {"decisions": _labelled("decisions", decisions, dataset=name, version=version)}
    if not same:
        tables |= {
            "dataset_rows": _labelled("dataset_rows", rows.drop_columns(["name", "version"]), name=name, version=version),
            "policy_rules": schema.rows_table("policy_rules", [
                {"dataset": name, "version": version, "position": index, "rule": rule.name, "body": rule.body,
                 "parameters": json.dumps({key: parameters[key] for key in sorted(policy.parameters())})}
                for index, rule in enumerate(policy.active(parameters))
            ]),
            "datasets": schema.rows_table("datasets", [{
                "name": name, "version": version, "digest": digest, "policy_digest": policy_digest, "snapshot": lake.snapshot(),
                "parent": latest[0]["version"] if latest else None, "rows": len(rows),
            }]),
            "lineage": schema.rows_table("lineage", [
                {"child_kind": "dataset", "child_id": f"{name}@{version}", "parent_kind": "dataset", "parent_id": f"{parent}@{number}",
                 "role": "drawn_from"}
                for parent, number in parents
            ]),
        }  # fmt: skip
    tables = {table: found for table, found in tables.items() if len(found)}
    if tables:
        lake.write(lambda connection: insert(connection, tables))
    return {"name": name, "version": version, "rows": len(rows), "digest": digest}


def _labelled(table: str, rows: pa.Table, **labels: Any) -> pa.Table:
    for column, value in labels.items():
        rows = rows.append_column(column, pa.array([value] * len(rows), schema.TABLES[table].field(column).type))
    return schema.conform(table, rows)
