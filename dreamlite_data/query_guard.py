"""Decide whether SQL written by a user may run: one statement, reading only, nothing outside the lake.
The connection is read-only and sandboxed as well; this closes what the sandbox leaves open (SQLite's own file access)."""

from __future__ import annotations

import json
import re
from typing import Any

import duckdb

ALLOWED_TABLE_FUNCTIONS = frozenset({
    "lineage_of", "caption_choices_at", "unnest", "range", "generate_series", "read_parquet", "parquet_scan", "parquet_metadata", "parquet_schema",
    "ducklake_snapshots", "ducklake_table_changes", "ducklake_table_insertions", "ducklake_table_deletions", "ducklake_table_info",
    "duckdb_tables", "duckdb_columns", "duckdb_views", "pragma_table_info",
})  # fmt: skip

_EXPLAIN = re.compile(r"^\s*explain(\s+analyze)?\s+", re.IGNORECASE)
_DESCRIBE = re.compile(r"^\s*(describe|desc|show|summarize)\b", re.IGNORECASE)
_NAME = re.compile(r'^\s*(describe|desc|show|summarize)(\s+(all\s+)?tables|\s+("[^"]+"|[\w.]+))?\s*;?\s*$', re.IGNORECASE)


class RefusedQuery(ValueError):
    """The SQL is not one of the statements that a reader may run."""


def check(sql: str, connection: duckdb.DuckDBPyConnection) -> None:
    """Return if `sql` may run, else raise RefusedQuery with what is wrong and what is allowed."""
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise RefusedQuery(f"the SQL cannot be parsed: {str(error).splitlines()[0]}") from None
    if len(statements) != 1:
        raise RefusedQuery(f"one statement at a time, not {len(statements)}")
    inner = _EXPLAIN.sub("", sql, count=1)
    if inner != sql:
        check(inner, connection)  # EXPLAIN ANALYZE runs what it explains
        return
    if statements[0].type.name != "SELECT":
        raise RefusedQuery(
            f"a {statements[0].type.name} statement is refused: this connection answers only SELECT, WITH, FROM, DESCRIBE, SHOW, "
            "SUMMARIZE and EXPLAIN"
        )
    if _NAME.match(sql):
        return
    body = _DESCRIBE.sub("", sql, count=1)
    # PRAGMA calls parse as SELECT too but do not serialise, and so are refused here with everything else unknown.
    serialised = json.loads(connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [body]).fetchone()[0])
    if serialised.get("error"):
        raise RefusedQuery(f"the SQL is not a plain SELECT: {serialised.get('error_message', 'it cannot be analysed')}")
    for name in _table_functions(serialised):
        if name not in ALLOWED_TABLE_FUNCTIONS:
            raise RefusedQuery(f"the table function {name} is refused here; allowed are {', '.join(sorted(ALLOWED_TABLE_FUNCTIONS))}")


def _table_functions(node: Any) -> list[str]:
    """Names of every table function in a serialised statement, lower case."""
    found = []
    if isinstance(node, dict):
        if node.get("type") == "TABLE_FUNCTION":
            found.append(str(node.get("function", {}).get("function_name", "")).lower())
        for value in node.values():
            found += _table_functions(value)
    elif isinstance(node, list):
        for value in node:
            found += _table_functions(value)
    return found
