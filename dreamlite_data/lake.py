"""The versioned lake: tables, snapshots, commits and views over DuckLake with its catalog in SQLite.
Everything the pipeline knows is a row here; what is too large for a row lies beside it under `files/`."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import random
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module, resources
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa

from dreamlite_data import query_guard, schema

T = TypeVar("T")

RETRIED_ERRORS = ("database is locked", "database is busy", "sqlite_busy")
RETRY_LIMIT_S = 60.0
BUSY_TIMEOUT_MS = 2000
EXTENSIONS = ("duckdb_extension_sqlite_scanner", "duckdb_extension_ducklake")
VIEWS_FILE = "views.sql"
SPILL = ".spill-"
SPILL_KEPT_S = 86_400.0
"""A folder of spilled memory that nobody wrote to for so long was left by a killed process."""


class LakeError(RuntimeError):
    """The lake cannot do what was asked; the message says what, where and how to mend."""


def _extension_file(module_name: str) -> Path:
    try:
        folder = Path(str(import_module(module_name).__file__)).parent
    except ImportError as error:
        raise LakeError(f"the package {module_name.replace('_', '-')} is missing: pip install {module_name.replace('_', '-')}=="
                        f"{duckdb.__version__}") from error  # fmt: skip
    files = sorted(folder.glob(f"extensions/v{duckdb.__version__}/*.duckdb_extension"))
    if not files:
        raise LakeError(f"{module_name} carries no extension for DuckDB {duckdb.__version__}: install the same version of both")
    return files[0]


class Lake:
    """One lake in one directory: `catalog.sqlite`, `data/` (Parquet) and `files/` (checkpoints, bundles, reports, sources).

    Many processes may hold the same lake: readers see the last committed snapshot and never wait for a writer.
    Writers of one machine take turns; a catalog that is locked by somebody else is tried again for up to a minute.
    """

    def __init__(self, root: Path | str, read_only: bool = False) -> None:
        self.root = Path(root).absolute()
        self.read_only = read_only
        self.retries = 0
        """Commits that found the catalog locked and were tried again."""
        self.data = self.root / "data"
        self.files = self.root / "files"
        self.staging = self.root / ".staging"
        self._local_lock = threading.RLock()
        self._held: set[str] = set()
        catalog = self.root / "catalog.sqlite"
        if read_only:
            if not catalog.exists():
                raise LakeError(f"there is no lake at {self.root}: write one first with `dreamlite refresh`")
        else:
            for folder in (self.data, self.files, self.staging):
                folder.mkdir(parents=True, exist_ok=True)
        self._connection = self._connect(read_only)
        self._guarded: duckdb.DuckDBPyConnection | None = None
        if not read_only:
            self._ensure_tables()

    def _connect(self, read_only: bool) -> duckdb.DuckDBPyConnection:
        # What does not fit into memory goes to a folder of this connection alone, for DuckDB empties the folder when it closes. Its
        # default is one in the working directory, for all.
        spill = (Path(tempfile.gettempdir()) if read_only else self.root) / f"{SPILL}{uuid.uuid4().hex}"
        settings = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false", "temp_directory": str(spill)}
        connection = duckdb.connect(":memory:", config=settings)
        for name in EXTENSIONS:
            connection.execute(f"LOAD '{_extension_file(name)}'")
        catalog, data = (str(path).replace("'", "''") for path in (self.root / "catalog.sqlite", self.data))
        options = [f"DATA_PATH '{data}'", "OVERRIDE_DATA_PATH true", f"META_BUSY_TIMEOUT {BUSY_TIMEOUT_MS}"]
        options.append("READ_ONLY" if read_only else "META_JOURNAL_MODE 'WAL'")
        self._retry(lambda: connection.execute(f"ATTACH 'ducklake:sqlite:{catalog}' AS lake ({', '.join(options)})"))
        connection.execute("USE lake")
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET preserve_insertion_order = true")
        connection.execute("SET enable_external_file_cache = false")  # it keeps something of every file that was ever read
        return connection

    def close(self) -> None:
        """Close every connection; the lake object is of no use afterwards."""
        for connection in (self._connection, self._guarded):
            if connection is not None:
                connection.close()

    def __enter__(self) -> Lake:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- reading -------------------------------------------------------------------------------------------------

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        cursor = self._connection.cursor()
        cursor.execute("USE lake")
        return cursor

    def query(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] | None = None, **tables: pa.Table) -> pa.Table:
        """Answer `sql` with the last committed snapshot. Keyword tables can be named in the SQL like lake tables."""
        with contextlib.closing(self._cursor()) as cursor:
            for name, rows in tables.items():
                cursor.register(name, rows)
            return self._retry(lambda: cursor.execute(sql, parameters).to_arrow_table())

    def query_read_only(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] | None = None) -> pa.Table:
        """Answer SQL from a user: one SELECT, WITH, FROM, DESCRIBE, SHOW, SUMMARIZE or EXPLAIN statement, on a connection
        that cannot write and cannot open a file outside the lake. Anything else raises LakeError."""
        with self._local_lock:
            if self._guarded is None:
                self._guarded = self._connect(read_only=True)
                data = str(self.data).replace("'", "''")
                self._guarded.execute(f"SET allowed_directories = ['{data}/']")
                self._guarded.execute("SET enable_external_access = false")
                self._guarded.execute("SET lock_configuration = true")
            try:
                query_guard.check(sql, self._guarded)
            except query_guard.RefusedQuery as error:
                raise LakeError(str(error)) from None
            try:
                return self._retry(lambda: self._guarded.execute(sql, parameters).to_arrow_table())
            except duckdb.Error as error:
                raise LakeError(f"the query failed: {error}") from None

    def snapshot(self) -> int:
        """Id of the newest committed snapshot."""
        return self.query("SELECT max(snapshot_id) AS id FROM ducklake_snapshots('lake')")["id"][0].as_py()

    def count(self, table: str) -> int:
        """Number of rows in `table` now."""
        return self.query(f"SELECT count(*) AS n FROM {table}")["n"][0].as_py()

    # --- writing -------------------------------------------------------------------------------------------------

    def write(self, body: Callable[[duckdb.DuckDBPyConnection], T]) -> T:
        """Run `body(connection)` in one transaction and commit. When the catalog is locked the whole of `body` runs
        again, so it must have no effect but on its connection."""
        if self.read_only:
            raise LakeError(f"the lake at {self.root} was opened read-only: open it with Lake(root) to write")
        with self.exclusive("write"):
            return self._retry(lambda: self._attempt(body))

    def _attempt(self, body: Callable[[duckdb.DuckDBPyConnection], T]) -> T:
        with contextlib.closing(self._cursor()) as cursor:
            cursor.execute("BEGIN TRANSACTION")
            try:
                answer = body(cursor)
                cursor.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(duckdb.Error):  # a failed COMMIT has already ended the transaction
                    cursor.execute("ROLLBACK")
                raise
            return answer

    @contextlib.contextmanager
    def transaction(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """Several statements, one commit. Other writers of this machine wait meanwhile. The body cannot be run again, so
        prefer `append` or `write` wherever writers of other machines share the catalog."""
        if self.read_only:
            raise LakeError(f"the lake at {self.root} was opened read-only: open it with Lake(root) to write")
        with self.exclusive("write"), contextlib.closing(self._cursor()) as cursor:
            cursor.execute("BEGIN TRANSACTION")
            try:
                yield cursor
                cursor.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(duckdb.Error):
                    cursor.execute("ROLLBACK")
                raise

    def append(self, tables: Mapping[str, pa.Table | list[dict]]) -> None:
        """Add rows to one or more tables in one transaction. Missing columns become null, unknown ones raise ValueError."""
        ready = {
            name: schema.rows_table(name, rows) if isinstance(rows, list) else schema.conform(name, rows)
            for name, rows in tables.items()
            if len(rows)
        }
        if ready:
            self.write(lambda connection: insert(connection, ready))

    def add_files(self, tables: Mapping[str, Sequence[Path | str]], also: Mapping[str, pa.Table] | None = None) -> None:
        """Register Parquet files that workers wrote, all in one transaction; rows of `also` go into the same commit.
        Files outside the lake's data directory are moved into it first."""
        placed = {name: [self.place(name, Path(path)) for path in paths] for name, paths in tables.items()}
        ready = {name: schema.conform(name, rows) for name, rows in (also or {}).items() if len(rows)}

        def body(connection: duckdb.DuckDBPyConnection) -> None:
            register_files(connection, placed)
            insert(connection, ready)

        self.write(body)

    def place(self, table: str, path: Path) -> Path:
        """Move a worker's file to where the table's data lies, under a name that no registered file has."""
        folder = self.data / "main" / table
        if path.parent == folder:
            return path
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            target = folder / f"{path.stem}-{number}.parquet"
            try:
                os.link(path, target)  # fails where the name is taken, even by another process at this moment
            except FileExistsError:
                continue
            except OSError:  # another file system: links cannot cross
                target = folder / f"{path.stem}-{uuid.uuid4().hex}.parquet"
                shutil.copyfile(path, target)
            path.unlink()
            return target
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Hold the lake-wide lock `name`; it falls free by itself when this process dies. Re-entrant in one thread."""
        with self._local_lock:
            if name in self._held:
                yield
                return
            with open(self.root / f".{name}.lock", "w") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX)
                self._held.add(name)
                try:
                    yield
                finally:
                    self._held.discard(name)

    def _retry(self, action: Callable[[], T]) -> T:
        deadline = time.monotonic() + RETRY_LIMIT_S
        pause_s = 0.02
        while True:
            try:
                return action()
            except duckdb.Error as error:
                locked = any(text in str(error).lower() for text in RETRIED_ERRORS)
                if not locked:
                    raise
                if time.monotonic() > deadline:
                    raise LakeError(
                        f"the catalog {self.root / 'catalog.sqlite'} stayed locked for {RETRY_LIMIT_S:.0f} s: find the process "
                        "that holds it open in a transaction, end it, and run again"
                    ) from error
                self.retries += 1
                time.sleep(pause_s * random.uniform(0.5, 1.5))  # jitter, so that two writers do not meet again
                pause_s = min(1.0, pause_s * 2)

    # --- housekeeping --------------------------------------------------------------------------------------------

    def _ensure_tables(self) -> None:
        views = resources.files("dreamlite_data").joinpath(VIEWS_FILE).read_text()
        digest = hashlib.sha256(views.encode()).hexdigest()
        if not self._missing_columns() and self._views_digest() == digest:
            return
        with self.exclusive("write"):
            missing = self._missing_columns()
            if missing:
                self.write(lambda connection: _create_tables(connection, missing))
                self.write(_inline_tracking)  # an option can be set only on a committed table
            if self._views_digest() != digest:
                self.write(lambda connection: _create_views(connection, views, digest))

    def _missing_columns(self) -> dict[str, list[str]]:
        """Columns of the schema that this lake does not have yet, by table; all of them where the table itself is new."""
        rows = self.query("SELECT table_name, column_name FROM duckdb_columns() WHERE database_name = 'lake'").to_pylist()
        have = {(row["table_name"], row["column_name"]) for row in rows}
        wanted = {**{name: table.names for name, table in schema.TABLES.items()}, "lake_info": ["key", "value"]}
        missing = {name: [column for column in columns if (name, column) not in have] for name, columns in wanted.items()}
        return {name: columns for name, columns in missing.items() if columns}

    def _views_digest(self) -> str | None:
        rows = self.query("SELECT value FROM lake_info WHERE key = 'views'")["value"].to_pylist()
        return rows[-1] if rows else None

    def clean(self) -> int:
        """Delete Parquet files that no snapshot knows: what a killed worker or driver left. Returns how many."""
        with self.exclusive("refresh"), self.exclusive("write"):
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging.mkdir()
            for folder in self.root.glob(f"{SPILL}*"):
                if time.time() - folder.stat().st_mtime > SPILL_KEPT_S:
                    shutil.rmtree(folder, ignore_errors=True)
            known = set(self.query("SELECT path FROM __ducklake_metadata_lake.ducklake_data_file")["path"].to_pylist())
            known |= set(self.query("SELECT path FROM __ducklake_metadata_lake.ducklake_delete_file")["path"].to_pylist())
            known = {os.path.basename(path) for path in known}
            lost = [path for path in self.data.rglob("*.parquet") if path.name not in known]
            for path in lost:
                path.unlink()
            return len(lost)


def insert(connection: duckdb.DuckDBPyConnection, tables: Mapping[str, pa.Table]) -> None:
    """Insert conforming Arrow tables within an open transaction."""
    for name, rows in tables.items():
        connection.register("rows_to_insert", rows)
        connection.execute(f"INSERT INTO {name} BY NAME SELECT * FROM rows_to_insert")
        connection.unregister("rows_to_insert")


def register_files(connection: duckdb.DuckDBPyConnection, tables: Mapping[str, Sequence[Path]]) -> None:
    """Register Parquet files within an open transaction."""
    for name, paths in tables.items():
        if name not in schema.TABLES:
            raise KeyError(f"the lake has no table {name!r}; its tables are {', '.join(schema.TABLES)}")
        if paths:
            # A table of an older lake may have columns that the schema no longer names: they are null from here on.
            connection.execute("CALL ducklake_add_data_files('lake', ?, ?, allow_missing => true)", [name, [str(path) for path in paths]])


def _create_tables(connection: duckdb.DuckDBPyConnection, missing: Mapping[str, Sequence[str]]) -> None:
    """Create tables that a lake lacks, and add columns that came with a newer version of the package (null in old rows)."""
    # DuckLake keeps small inserts in the catalog, which suits the tracking tables: they grow by a few rows at a time.
    # Elsewhere it is off, for it also reserves the column name row_id.
    connection.execute("CALL ducklake_set_option('lake', 'data_inlining_row_limit', 0)")
    connection.execute("CREATE TABLE IF NOT EXISTS lake_info (key VARCHAR, value VARCHAR)")
    for name, arrow_schema in schema.TABLES.items():
        connection.register("empty_rows", arrow_schema.empty_table())
        connection.execute(f"CREATE TABLE IF NOT EXISTS {name} AS SELECT * FROM empty_rows LIMIT 0")
        types = {row[0]: row[1] for row in connection.execute("DESCRIBE SELECT * FROM empty_rows").fetchall()}
        for column in missing.get(name, ()):
            connection.execute(f"ALTER TABLE {name} ADD COLUMN IF NOT EXISTS {column} {types[column]}")
        connection.unregister("empty_rows")


def _inline_tracking(connection: duckdb.DuckDBPyConnection) -> None:
    for name in (*schema.TRACKING, "op_shard", "operator_versions", "datasets", "policy_rules"):
        connection.execute("CALL ducklake_set_option('lake', 'data_inlining_row_limit', 100, table_name => ?)", [name])


def _create_views(connection: duckdb.DuckDBPyConnection, views: str, digest: str) -> None:
    for statement in re.split(r";\s*\n", views):
        if statement.strip():
            connection.execute(statement)
    connection.execute("DELETE FROM lake_info WHERE key = 'views'")
    connection.execute("INSERT INTO lake_info VALUES ('views', ?)", [digest])
