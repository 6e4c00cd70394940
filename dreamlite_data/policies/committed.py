"""Policies that users committed: kept in the lake as text, and used by every refresh until they are reset.
Their SQL comes from outside, so before it runs each block is checked to be what it claims, and bound on the guarded connection."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from dreamlite_data.lake import Lake, LakeError
from dreamlite_data.policies.policy import REQUIRED_COLUMNS, Policy, PolicyError, parameters_of, read_policy
from dreamlite_data.policies.quota import check_columns

_NO_COLUMN = re.compile(r'(?:Referenced column|column named|does not have a column named) "([^"]+)"')
_NO_TABLE = re.compile(r"Table with name (\S+) does not exist")


@dataclasses.dataclass(frozen=True)
class CommittedPolicy:
    """A policy that stands in the lake, with the parameters that `--set` gave when it was committed."""

    policy: Policy
    text: str
    parameters: dict[str, Any]
    version: int


def committed_policies(lake: Lake) -> dict[str, CommittedPolicy]:
    """The policies in force by dataset, in the order in which their datasets were first committed."""
    rows = lake.query(
        "SELECT name, arg_max(text, position) FILTER (text IS NOT NULL) AS text, arg_max(coalesce(text, ''), position) AS newest, "
        "arg_max(parameters_json, position) AS parameters_json, arg_max(version, position) AS version FROM policies "
        "GROUP BY name ORDER BY min(position)"
    ).to_pylist()
    return {
        row["name"]: CommittedPolicy(
            read_policy(row["name"], row["text"], f"the committed policy {row['name']}"), row["text"],
            _parameters(row["parameters_json"]), row["version"],
        )
        for row in rows
        if row["newest"]
    }  # fmt: skip


def _parameters(stored: str | None) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(stored or "{}").items()}


def store(lake: Lake, name: str, text: str | None, digest: str | None, parameters: Mapping[str, Any], version: int | None) -> None:
    """Put a policy in force for the dataset `name`; None takes it out of force again."""
    top = lake.query("SELECT coalesce(max(position), -1) + 1 AS next FROM policies")["next"][0].as_py()
    lake.append({"policies": [{
        "name": name, "position": top, "digest": digest, "text": text, "parameters_json": json.dumps(dict(parameters)),
        "committed_at": datetime.now(UTC), "version": version,
    }]})  # fmt: skip


# --- checking SQL from outside ---------------------------------------------------------------------------------------


def check_sql(lake: Lake, policy: Policy, parameters: Mapping[str, Any], where: str) -> list[str]:
    """Refuse (PolicyError) a block that is not one SELECT or not one expression, that would write or look outside the lake, or
    that names a column or table which is not there. The same blocks then have nothing else to bind to on any connection.
    Returns the columns of the candidates."""
    _check_one_select(lake, policy.candidates, "candidates", where)
    try:
        columns = lake.query_read_only(f"SELECT * FROM ({policy.candidates}\n) LIMIT 0", _only(parameters, policy.candidates)).column_names
    except LakeError as error:
        raise PolicyError(f"{where}: the candidates: {_explain(str(error), _known_names(lake))}") from None
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        raise PolicyError(f"{where}: the candidates lack the columns {', '.join(missing)}; every policy must select them")
    rules = policy.active(dict(parameters))
    for rule in rules:
        _check_expression(lake, rule.name, rule.body, where)
    for together in (rules, *([rule] for rule in rules)):  # all at once, and one by one only to say which it is
        sql = f"SELECT {', '.join(f'({rule.body})' for rule in together)} FROM ({policy.candidates}) LIMIT 0"
        try:
            lake.query_read_only(sql, _only(parameters, sql))
        except LakeError as error:
            if len(together) > 1:
                continue
            raise PolicyError(f"{where}: the rule {together[0].name}: {_explain(str(error), columns)}") from None
        if len(together) == len(rules):
            break
    if policy.quota is not None:
        _check_quota(lake, policy.quota, parameters, where)
    return columns


def _check_quota(lake: Lake, body: str, parameters: Mapping[str, Any], where: str) -> None:
    _check_one_select(lake, body, "quota", where)
    try:
        columns = lake.query_read_only(f"SELECT * FROM ({body}\n) LIMIT 0", _only(parameters, body)).column_names
    except LakeError as error:
        raise PolicyError(f"{where}: the quota block: {_explain(str(error), _known_names(lake))}") from None
    check_columns(columns, where)


def _only(parameters: Mapping[str, Any], sql: str) -> dict[str, Any]:
    """The parameters that this SQL names: DuckDB refuses others."""
    return {name: parameters[name] for name in sorted(parameters_of(sql) & parameters.keys())}


def _check_one_select(lake: Lake, body: str, block: str, where: str) -> None:
    if _serialised(lake, body) is None or _serialised(lake, f"SELECT * FROM ({body})") is None:
        raise PolicyError(f"{where}: '-- @{block}' must hold one SELECT, which may neither write nor end in a comment")


def _check_expression(lake: Lake, name: str, body: str, where: str) -> None:
    """The body is pasted between parentheses later: alone and in parentheses it must be one expression, with no FROM."""
    alone, inside = _serialised(lake, f"SELECT {body}"), _serialised(lake, f"SELECT ({body})")
    node = alone["statements"][0]["node"] if alone else {}
    single = (
        alone is not None
        and inside is not None
        and node.get("type") == "SELECT_NODE"
        and len(node["select_list"]) == 1
        and node["from_table"]["type"] == "EMPTY"
        and not node.get("where_clause")
        and not node.get("modifiers")
    )
    if not single:
        raise PolicyError(f"{where}: the rule {name} must be one expression over the candidates' columns, without a comment at its end")


def _serialised(lake: Lake, sql: str) -> dict[str, Any] | None:
    """DuckDB's own reading of `sql` as one SELECT, or None."""
    answer = lake.query("SELECT json_serialize_sql($sql::VARCHAR) AS tree", {"sql": sql})["tree"][0].as_py()
    tree = json.loads(answer)
    return None if tree.get("error") or len(tree.get("statements", ())) != 1 else tree


def _known_names(lake: Lake) -> list[str]:
    rows = lake.query("SELECT DISTINCT table_name, column_name FROM duckdb_columns() WHERE database_name = 'lake'").to_pylist()
    return sorted({row["table_name"] for row in rows} | {row["column_name"] for row in rows})


def _explain(message: str, known: Sequence[str]) -> str:
    """DuckDB's words in one line; where a column or table is unknown, the nearest that there is."""
    found = _NO_COLUMN.search(message) or _NO_TABLE.search(message)
    if found is None:
        return " ".join(message.split())
    near = difflib.get_close_matches(found.group(1), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known[:40])}"
    kind = "column" if _NO_COLUMN.search(message) else "table"
    return f"there is no {kind} {found.group(1)!r}; {hint}"
