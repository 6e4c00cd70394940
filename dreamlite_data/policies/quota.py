"""Cap each edit type at its quota when a dataset version is made: of the rows that pass every rule, the surplus goes.
Which rows go is decided by score, then by a hash of the row's id, and each is recorded with the reason `quota`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dreamlite_data.lake import Lake
from dreamlite_data.policies.policy import QUOTA, Policy, PolicyError, parameters_of
from dreamlite_data.quotas import QuotaError, Quotas, read_quotas
from dreamlite_data.taxonomy import EditType

TYPE_COLUMNS = ("row_id", "level1", "level2")


def given_quotas(parameters: Mapping[str, Any]) -> Quotas:
    """The quotas in the parameters of a policy. Raises PolicyError."""
    try:
        return read_quotas(parameters["quotas"])
    except QuotaError as error:
        raise PolicyError(f"the parameter quotas: {error}") from None


def check_rows(value: Any) -> int | None:
    """The parameter quota_rows, if it is a count or null; else PolicyError."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise PolicyError(f"the parameter quota_rows is {value!r}: give a whole number of rows above 0, or null for all that pass the rules")


def cap(lake: Lake, policy: Policy, judged: pa.Table, parameters: Mapping[str, Any], position: int) -> tuple[pa.Table, int, int]:
    """`judged` with the surplus of each type dropped as the rule QUOTA at `position`, how many rows passed the rules before it, and how
    many of them it drops. The cap of a type is its share of $quota_rows, or of the rows that pass; the margin of a dropped row is
    the cap less its place in its type. A type without a share has cap 0. Raises PolicyError."""
    quotas = given_quotas(parameters)
    passed = judged.filter(pc.equal(judged["verdict"], "keep")).select(["row_id"])
    rows = check_rows(parameters.get("quota_rows"))
    caps = quotas.counts(len(passed) if rows is None else rows)
    typed = _types(lake, policy, passed, parameters)
    kinds = typed.group_by(["level1", "level2"]).aggregate([]).to_pylist()
    names = pa.table({
        "level1": pa.array([kind["level1"] for kind in kinds], pa.string()), "level2": pa.array([kind["level2"] for kind in kinds], pa.string()),
        "name": pa.array([quotas.name_of(EditType(kind["level1"] or "", kind["level2"] or "")) for kind in kinds], pa.string()),
    })  # fmt: skip
    most = pa.table({"name": pa.array(list(caps), pa.string()), "most": pa.array(list(caps.values()), pa.int64())})
    surplus = lake.query(
        "WITH placed AS (SELECT t.row_id, n.name, row_number() OVER (PARTITION BY n.name ORDER BY CASE WHEN isnan(t.score) THEN NULL ELSE "
        "t.score END DESC NULLS LAST, sha256('quota:' || t.row_id), t.row_id) AS place FROM typed t LEFT JOIN names n ON "
        "n.level1 IS NOT DISTINCT FROM t.level1 AND n.level2 IS NOT DISTINCT FROM t.level2) "
        "SELECT p.row_id, CAST(coalesce(m.most, 0) - p.place AS DOUBLE) AS margin FROM placed p LEFT JOIN most m ON m.name = p.name "
        "WHERE p.place > coalesce(m.most, 0) ORDER BY p.row_id",
        typed=typed,
        names=names,
        most=most,
    )
    return _dropped(judged, surplus, position), len(passed), len(surplus)


def _types(lake: Lake, policy: Policy, passed: pa.Table, parameters: Mapping[str, Any]) -> pa.Table:
    """row_id, level1, level2 and score of each row that passed; null where the block knows no type of it."""
    body = str(policy.quota)
    used = {name: parameters[name] for name in sorted(parameters_of(body))}
    columns = lake.query(f"DESCRIBE SELECT * FROM ({body})", used)["column_name"].to_pylist()
    check_columns(columns, policy.dataset)
    score = "CAST(t.score AS DOUBLE)" if "score" in columns else "CAST(NULL AS DOUBLE)"
    typed = lake.query(
        f"SELECT p.row_id, t.level1, t.level2, {score} AS score FROM passed p LEFT JOIN ({body}) t ON t.row_id = p.row_id ORDER BY p.row_id",
        used,
        passed=passed,
    )
    if len(typed) != len(passed):
        raise PolicyError(f"the '-- @quota' block of {policy.dataset} gives {len(typed)} types for {len(passed)} rows: it may name a row once only")
    return typed


def check_columns(columns: list[str], where: str) -> None:
    """Raise PolicyError where a '-- @quota' block does not say the type of each row."""
    missing = [name for name in TYPE_COLUMNS if name not in columns]
    if missing:
        raise PolicyError(f"{where}: the '-- @quota' block lacks the columns {', '.join(missing)}; it selects row_id, level1, level2 and, if it likes, score")


def _dropped(judged: pa.Table, surplus: pa.Table, position: int) -> pa.Table:
    place = pc.index_in(judged["row_id"], value_set=surplus["row_id"].combine_chunks()).combine_chunks()
    hit = pc.is_valid(place)
    values = {
        "verdict": pa.scalar("drop"), "first_rule": pa.scalar(QUOTA), "rule_position": pa.scalar(position, pa.int32()),
        "margin": surplus["margin"].combine_chunks().take(place), "failed": pa.scalar([QUOTA], pa.list_(pa.string())),
    }  # fmt: skip
    for name, value in values.items():
        column = judged.column_names.index(name)
        judged = judged.set_column(column, judged.schema.field(column), pc.if_else(hit, value, judged[name].combine_chunks()))
    return judged


_QUOTA_WORDS = re.compile(r"\$(quotas|quota_rows)\b")


def refuse_own_use(policy: Policy) -> None:
    """$quotas is no value that SQL could read: whoever names it in a block means the '-- @quota' block. Raises PolicyError."""
    found = _QUOTA_WORDS.search(" ".join([policy.candidates, str(policy.quota or ""), *(rule.body for rule in policy.rules)]))
    if found:
        raise PolicyError(f"policies/{policy.dataset}.sql reads ${found.group(1)} in SQL: quotas belong to the '-- @quota' block, which applies them itself")
