"""Decide: run each policy over its candidates, keep every verdict, and freeze the kept rows as a dataset version.
The same rows under the same policy are the same version, however often this runs."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dreamlite_data import schema
from dreamlite_data.lake import Lake, insert
from dreamlite_data.policies.candidates import candidates_sql
from dreamlite_data.policies.committed import check_sql, committed_policies
from dreamlite_data.policies.policy import REQUIRED_COLUMNS, Policy, Rule, parameters_of, read_policy
from dreamlite_data.policies.quota import cap, refuse_own_use
from dreamlite_data.policies.splits import with_split

DATASETS = ("t2i", "edit", "photos", "photo_edits", "sft", "rl")
"""In the order in which they are made: later ones draw from earlier ones."""
# From how many rows on a unanimous rule is a surprise: a rare fault can be absent from hundreds of rows, but a rule that
# rejects the first fifty rejects everything.
PASS_ALL_ROWS = 1000
REJECT_ALL_ROWS = 50
DIGEST_ROWS = 65536
ROW_COLUMNS = ("row_id", *REQUIRED_COLUMNS[1:], "split")


class CurationError(RuntimeError):
    """A policy gave an answer that cannot be meant: the message says which rule, and how to mend or allow it."""


def curate(lake: Lake, parameters: dict[str, Any], datasets: tuple[str, ...] = DATASETS) -> list[dict[str, Any]]:
    """Make the current version of each dataset that has candidates; returns name, version, rows, digest of each.
    `parameters` are the policy settings and `sources`, `seed`, `benchmarks` (names); `allow_unanimous` lists rules that may be
    unanimous; `quotas` and `quota_rows` cap edit types. A policy that a user committed stands in for the packaged one of its name, or
    adds a dataset of its own."""
    parameters = {"benchmarks": (), "quotas": None, "quota_rows": None, **parameters}
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
    refuse_own_use(policy)
    rules = policy.active(parameters)
    unknown = policy.parameters() - parameters.keys()
    if unknown:
        raise CurationError(f"policies/{policy.dataset}.sql reads ${', $'.join(sorted(unknown))}, which no setting provides")
    tests = ", ".join(
        f"coalesce(({rule.body}) {'>= 0' if rule.margin else ''}, false) AS pass_{index}, "
        f"{f'CAST(({rule.body}) AS DOUBLE)' if rule.margin else 'CAST(NULL AS DOUBLE)'} AS margin_{index}"
        for index, rule in enumerate(rules)
    )
    margin = "CASE " + " ".join(f"WHEN NOT pass_{index} THEN margin_{index}" for index in range(len(rules))) + " END"
    failures = " + ".join(f"CASE WHEN pass_{index} THEN 0 ELSE {1 << index} END" for index in range(len(rules)))
    source, used = candidates_sql(lake, policy, parameters)
    used |= {name: parameters[name] for name in set().union(*(parameters_of(rule.body) for rule in rules))}
    sql = (
        f"WITH candidates AS (SELECT * FROM {source}), judged AS (SELECT *, {tests} FROM candidates) "
        f"SELECT * EXCLUDE ({', '.join(f'pass_{index}, margin_{index}' for index in range(len(rules)))}), "
        f"{margin} AS margin, CAST({failures} AS BIGINT) AS failures "
        f"FROM judged{' ORDER BY row_id' if not source.startswith('read_parquet') else ''}"  # the file is sorted, and order is kept
    )
    found = lake.query(sql, used)
    missing = [column for column in REQUIRED_COLUMNS if column not in found.column_names]
    if missing:
        raise CurationError(f"the candidates of policies/{policy.dataset}.sql lack the columns {', '.join(missing)}")
    judged = _with_verdicts(found, [rule.name for rule in rules])
    rejected_by = np.bincount(judged["rule_position"].drop_null().to_numpy(), minlength=len(rules)).tolist()
    outcome, reached = [], len(judged)
    for rule, rejected in zip(rules, rejected_by, strict=True):
        outcome.append((rule, reached, rejected))
        reached -= rejected
    if policy.caps(parameters):
        judged, reached, rejected = cap(lake, policy, judged, parameters, len(rules))
        outcome.append((policy.stages(parameters)[-1], reached, rejected))
    return judged, outcome


def _with_verdicts(found: pa.Table, names: list[str]) -> pa.Table:
    """The bits of `failures` (one per rule) as verdict, first_rule, rule_position and failed. A million rows share a few
    combinations: each is put into words once."""
    coded = found["failures"].combine_chunks().dictionary_encode()
    combinations = [[place for place in range(len(names)) if bits >> place & 1] for bits in coded.dictionary.to_pylist()]
    said = {
        "verdict": pa.array(["drop" if places else "keep" for places in combinations], pa.string()),
        "first_rule": pa.array([names[places[0]] if places else None for places in combinations], pa.string()),
        "rule_position": pa.array([places[0] if places else None for places in combinations], pa.int32()),
        "failed": pa.array([[names[place] for place in places] for places in combinations], pa.list_(pa.string())),
    }
    judged, margin = found.drop_columns(["failures", "margin"]), found["margin"]
    for name in ("verdict", "first_rule", "rule_position"):
        judged = judged.append_column(name, said[name].take(coded.indices))
    return judged.append_column("margin", margin).append_column("failed", said["failed"].take(coded.indices))


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


def rows_digest(rows: pa.Table) -> str:
    """sha256 over the rows in row_id order: what a dataset version is, apart from its number. Taken column by column over
    blocks of a fixed count, so that neither Python rows nor the chunks of a table come into it."""
    total = hashlib.sha256(json.dumps([[name, str(rows.schema.field(name).type)] for name in ROW_COLUMNS]).encode())
    for start in range(0, len(rows), DIGEST_ROWS):
        for name in ROW_COLUMNS:
            _digest_column(total, rows[name].slice(start, DIGEST_ROWS).combine_chunks())
    return total.hexdigest()


def _digest_column(total: Any, column: pa.Array) -> None:
    """Feed validity, lengths and content of a column of text, bytes or numbers."""
    total.update(np.packbits(column.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
        total.update(pc.fill_null(column, 0).to_numpy(zero_copy_only=False).tobytes())
        return
    present = column.drop_null()
    total.update(pc.binary_length(present).to_numpy(zero_copy_only=False).tobytes())
    if len(present):
        _, offsets, content = present.buffers()
        ends = np.frombuffer(offsets, np.int32)[present.offset : present.offset + len(present) + 1]
        total.update(memoryview(content)[int(ends[0]) : int(ends[-1])] if content is not None else b"")


def freeze(
    lake: Lake, policy: Policy, judged: pa.Table, parameters: dict[str, Any], parents: list[tuple[str, int]]
) -> dict[str, Any]:
    """Keep every verdict, and the kept rows as a new version unless they are those of the newest under the same policy.
    Returns name, version, rows, digest."""
    name = policy.dataset
    kept = judged.filter(pc.equal(judged["verdict"], "keep"))
    if "split" not in kept.column_names:
        kept = with_split(lake, kept, parameters)
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
                 "parameters": json.dumps(policy.read(parameters))}
                for index, rule in enumerate(policy.stages(parameters))
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
        rows = rows.append_column(column, pa.repeat(pa.scalar(value, schema.TABLES[table].field(column).type), len(rows)))
    return schema.conform(table, rows)
