"""The lake keeps every commit, lets readers read meanwhile, and lets no user's SQL write or look outside."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from dreamlite_data import schema
from dreamlite_data.lake import Lake, LakeError
from dreamlite_data.operators.base import fetch, write_table

WRITER = """
import sys
from dreamlite_data.lake import Lake
lake = Lake(sys.argv[1])
for n in range(int(sys.argv[3])):
    lake.append({
        "metrics": [{"run_id": sys.argv[2], "step": "s", "name": "n", "position": float(n), "value": 1.0}],
        "lineage": [{"child_kind": "step", "child_id": f"{sys.argv[2]}-{n}", "parent_kind": "step", "parent_id": "p", "role": "r"}],
    })
"""

HOLDER = """
import sqlite3, sys, time
holder = sqlite3.connect(sys.argv[1], isolation_level=None)
holder.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """A lake with one row that guarded queries may try to get at."""
    lake = Lake(tmp_path_factory.mktemp("shared"))
    lake.append({"evals": [{"run_id": "kept"}]})
    return lake


def test_missing_columns_become_null_and_unknown_ones_are_refused(lake: Lake) -> None:
    lake.append({"evals": pa.table({"run_id": ["r"], "value": [0.5]})})
    assert lake.query("SELECT run_id, stage, value FROM evals").to_pylist() == [{"run_id": "r", "stage": None, "value": 0.5}]
    with pytest.raises(ValueError, match="no column wrong"):
        lake.append({"evals": [{"wrong": 1}]})
    with pytest.raises(KeyError, match="no table 'eval'"):
        lake.append({"eval": pa.table({"run_id": ["r"]})})
    assert lake.count("evals") == 1


def test_a_lake_of_an_older_schema_gets_the_new_columns_and_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = {name: table for name, table in schema.TABLES.items() if name != "metrics"}
    older["artifacts"] = pa.schema([field for field in schema.TABLES["artifacts"] if field.name != "metrics_json"])
    with monkeypatch.context() as patched:
        patched.setattr(schema, "TABLES", older)
        patched.setattr(schema, "TRACKING", {name: older[name] for name in schema.TRACKING if name in older})
        with Lake(tmp_path) as old:
            old.append({"artifacts": [{"artifact_id": "kept", "bytes": 7}]})
    with Lake(tmp_path) as new:
        new.append({"artifacts": [{"artifact_id": "later", "metrics_json": "{}"}], "metrics": [{"run_id": "r", "value": 1.0}]})
        rows = new.query("SELECT artifact_id, bytes, metrics_json FROM artifacts ORDER BY ALL").to_pylist()
        assert rows == [
            {"artifact_id": "kept", "bytes": 7, "metrics_json": None},
            {"artifact_id": "later", "bytes": None, "metrics_json": "{}"},
        ]
        assert new.count("metrics") == 1


def test_three_processes_committing_at_once_lose_nothing(tmp_path: Path) -> None:
    Lake(tmp_path).close()
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name, "8"]) for name in "abc"]
    assert [writer.wait(timeout=600) for writer in writers] == [0, 0, 0]
    lake = Lake(tmp_path, read_only=True)
    counts = lake.query("SELECT run_id, count(DISTINCT position) AS n FROM metrics GROUP BY ALL ORDER BY ALL").to_pylist()
    assert counts == [{"run_id": name, "n": 8} for name in "abc"]
    assert lake.count("metrics") == lake.count("lineage") == 24  # and nothing twice, although commits were tried again


@contextlib.contextmanager
def locked_by_another_process(root: Path, seconds: float) -> Iterator[None]:
    """Another process holds SQLite's write lock; in this one it would not count, for POSIX locks are per process."""
    command = [sys.executable, "-c", HOLDER, str(root / "catalog.sqlite"), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        yield
        holder.terminate()


def test_a_locked_catalog_is_tried_again_until_it_is_free(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    with locked_by_another_process(tmp_path, 3.0):  # longer than SQLite itself is told to wait
        lake.append({"evals": [{"run_id": "after"}]})
    assert lake.retries > 0
    assert lake.count("evals") == 1


def test_a_lock_that_never_ends_is_reported_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreamlite_data.lake.RETRY_LIMIT_S", 0.1)
    lake = Lake(tmp_path)
    with locked_by_another_process(tmp_path, 60.0), pytest.raises(LakeError, match="stayed locked.*find the process"):
        lake.append({"evals": [{"run_id": "never"}]})
    assert lake.count("evals") == 0


def test_a_reader_sees_the_last_commit_while_a_writer_is_at_work(tmp_path: Path) -> None:
    writer = Lake(tmp_path)
    writer.append({"evals": [{"run_id": "committed"}]})
    reader = Lake(tmp_path, read_only=True)
    with writer.transaction() as connection:
        connection.execute("INSERT INTO evals (run_id) VALUES ('open')")
        started = time.monotonic()
        assert reader.query("SELECT run_id FROM evals")["run_id"].to_pylist() == ["committed"]
        assert time.monotonic() - started < 5
    assert reader.count("evals") == 2


def test_a_failed_transaction_leaves_nothing(lake: Lake) -> None:
    with pytest.raises(ZeroDivisionError), lake.transaction() as connection:
        connection.execute("INSERT INTO evals (run_id) VALUES ('half')")
        raise ZeroDivisionError
    assert lake.count("evals") == 0
    lake.append({"evals": [{"run_id": "whole"}]})
    assert lake.count("evals") == 1


def test_files_of_several_tables_enter_in_one_snapshot(lake: Lake) -> None:
    rows = {
        "images": schema.rows_table("images", [{"image_id": f"{n:04d}", "bytes": bytes([n]) * 900} for n in range(40)]),
        "captions": schema.rows_table("captions", [{"caption_id": "c", "image_id": "0001", "text": "t"}]),
    }
    files = {name: [write_table(name, table, lake.staging, "key")] for name, table in rows.items()}
    before = lake.snapshot()
    lake.add_files(files)
    assert lake.snapshot() == before + 1
    assert (lake.count("images"), lake.count("captions")) == (40, 1)
    assert not list(lake.staging.iterdir())
    places = lake.query("SELECT image_id, filename, file_row_number FROM images WHERE image_id IN ('0003', '0039')").to_pylist()
    found = fetch({row["image_id"]: (row["filename"], row["file_row_number"]) for row in places}, ["0039", "0003"])
    assert found == [bytes([39]) * 900, bytes([3]) * 900]


def test_image_bytes_are_stored_plain_and_in_row_groups_of_about_16_mb(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    rows = schema.rows_table("images", [{"image_id": str(n), "bytes": bytes(2_000_000)} for n in range(20)])
    meta = pq.ParquetFile(write_table("images", rows, tmp_path, "key")).metadata
    assert meta.num_row_groups > 1
    column = next(meta.row_group(0).column(i) for i in range(meta.num_columns) if meta.row_group(0).column(i).path_in_schema == "bytes")
    assert column.compression == "UNCOMPRESSED" and not column.is_stats_set and not column.has_dictionary_page
    assert column.total_uncompressed_size <= 40_000_000


def test_what_no_snapshot_knows_is_cleaned_and_the_rest_stays(lake: Lake) -> None:
    table = schema.rows_table("captions", [{"caption_id": "c"}])
    lake.add_files({"captions": [write_table("captions", table, lake.staging, "kept")]})
    orphan = Path(write_table("captions", table, lake.data / "main" / "captions", "orphan"))
    Path(write_table("captions", table, lake.staging, "torn"))
    assert lake.clean() == 1
    assert not orphan.exists() and not list(lake.staging.iterdir())
    assert lake.count("captions") == 1


def test_what_does_not_fit_into_memory_spills_into_a_folder_of_the_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    sort = "SELECT hash(i)::VARCHAR AS word FROM range(1_000_000) t(i) ORDER BY word DESC OFFSET 1"
    root = tmp_path / "lake"
    with Lake(root) as lake, Lake(root) as other:
        spilled = []
        for each in (lake, other):
            each._connection.execute("SET memory_limit = '40MB'")
            assert each.query(f"SELECT count(*) AS n FROM ({sort})")["n"].to_pylist() == [999_999]
            spilled.append({path.name for path in root.glob(".spill-*")})
        assert len(spilled[0]) == 1 and len(spilled[1]) == 2
    assert not list(root.glob(".spill-*")) and not os.listdir(tmp_path / "here")
    for name, age_s in (("left", 2 * 86_400), ("in_use", 60)):
        (root / f".spill-{name}").mkdir()
        os.utime(root / f".spill-{name}", (time.time() - age_s,) * 2)
    with Lake(root) as lake:
        lake.clean()
    assert [path.name for path in root.glob(".spill-*")] == [".spill-in_use"]


def test_a_lake_that_is_not_there_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(LakeError, match="no lake at .*dreamlite refresh"):
        Lake(tmp_path / "absent", read_only=True)


def test_a_read_only_lake_refuses_to_write(tmp_path: Path) -> None:
    Lake(tmp_path).close()
    with pytest.raises(LakeError, match="read-only"):
        Lake(tmp_path, read_only=True).append({"evals": [{"run_id": "r"}]})


@pytest.mark.parametrize("sql", [
    "SELECT count(*) FROM evals", "WITH a AS (SELECT 1) FROM a", "FROM samples", "DESCRIBE triplets", "SHOW TABLES", "SUMMARIZE evals",
    "EXPLAIN SELECT * FROM why_dropped", "EXPLAIN ANALYZE SELECT 1", "SELECT * FROM lineage_of('x')", "SELECT * FROM funnel",
    "SELECT * FROM duplicates", "SELECT * FROM ducklake_snapshots('lake')",
])  # fmt: skip
def test_a_reader_may_ask(shared: Lake, sql: str) -> None:
    shared.query_read_only(sql)


@pytest.mark.parametrize("sql", [
    "INSERT INTO evals (run_id) VALUES ('x')", "DELETE FROM evals", "DROP TABLE evals", "CREATE TABLE t (a INT)", "UPDATE evals SET n = 1",
    "COPY evals TO '{lake}/data/out.csv'", "EXPLAIN ANALYZE COPY evals TO '{lake}/data/out.csv'", "EXPLAIN ANALYZE DELETE FROM evals",
    "ATTACH '{outside}' AS x", "SELECT 1; DROP TABLE evals", "SET enable_external_access = true", "PRAGMA database_list", "LOAD 'httpfs'",
    "INSTALL httpfs", "CALL ducklake_expire_snapshots('lake', older_than => now())",
    "SELECT * FROM ducklake_expire_snapshots('lake', older_than => now())", "SELECT * FROM read_text('/etc/hostname')",
    "SELECT * FROM '/etc/hostname'", "SELECT * FROM read_parquet('{outside}')", "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM sqlite_scan('{outside}', 'secret')", "SELECT (SELECT count(*) FROM sqlite_scan('{outside}', 'secret'))",
    "WITH a AS (FROM sqlite_scan('{outside}', 'secret')) FROM a", "DESCRIBE FROM sqlite_scan('{outside}', 'secret')",
    "SUMMARIZE FROM sqlite_scan('{outside}', 'secret')", "SELECT * FROM query('FROM sqlite_scan(''{outside}'', ''secret'')')",
    "not sql",
])  # fmt: skip
def test_a_reader_may_neither_write_nor_look_outside(shared: Lake, tmp_path: Path, sql: str) -> None:
    outside = tmp_path / "outside.sqlite"
    with sqlite3.connect(outside) as connection:
        connection.execute("CREATE TABLE secret (word TEXT)")
    snapshot = shared.snapshot()
    with pytest.raises(LakeError):
        shared.query_read_only(sql.replace("{lake}", str(shared.root)).replace("{outside}", str(outside)))
    assert shared.snapshot() == snapshot and shared.count("evals") == 1
    assert not list(shared.data.glob("*.csv"))


def test_lineage_runs_from_an_artifact_down_to_its_images(lake: Lake) -> None:
    edge = {"child_kind": "checkpoint", "parent_kind": "checkpoint", "role": "init"}
    lake.append({
        "lineage": [
            {"child_kind": "artifact", "child_id": "phone", "parent_kind": "checkpoint", "parent_id": "dmd2"},
            {**edge, "child_id": "dmd2", "parent_id": "t2i"},
            {**edge, "child_id": "t2i", "parent_kind": "dataset", "parent_id": "t2i@2"},
            {**edge, "child_id": "other", "parent_kind": "dataset", "parent_id": "t2i@1"},
        ],
        "datasets": [{"name": "t2i", "version": 1}, {"name": "t2i", "version": 2}],
        "dataset_rows": [
            {"name": "t2i", "version": 2, "row_id": "r", "image_id": "target", "source_image_id": "source"},
            {"name": "t2i", "version": 1, "row_id": "r", "image_id": "of another version"},
        ],
    })  # fmt: skip
    found = lake.query_read_only("SELECT kind, id FROM lineage_of('phone')").to_pylist()
    assert {(row["kind"], row["id"]) for row in found} == {
        ("artifact", "phone"), ("checkpoint", "dmd2"), ("checkpoint", "t2i"), ("dataset", "t2i@2"), ("image", "target"), ("image", "source"),
    }  # fmt: skip
    assert lake.query("SELECT count(*) AS n FROM lineage_of('nothing')")["n"][0].as_py() == 0
