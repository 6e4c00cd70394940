"""Make removed rows leave the disk: expire the snapshots that see them, delete their files, clear statistics and caches.
Then read everything that is left and say, as a digest over what was read, that nothing of them was found."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dreamlite_data.lake import Lake, LakeError

METADATA = "__ducklake_metadata_lake"
NAMES_OF_GROUPS = ("group_id",)
"""A group of duplicates keeps its name, the id of the image that opened it: splits of the others hang on it."""
CACHES = ("cache", "candidates", "downloads")
"""Folders below files/ that can be filled again."""
SHEETS = "reports"
"""Folder of the lake with the contact sheets of policies that were tried."""
OPAQUE_CACHES = ("cache/states-*", "candidates")
"""Those in which an image or its words cannot be told from the outside (hashed keys, compressed text): they go whole."""
_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_ID_BYTES = re.compile(_ID.pattern.encode())
_VACUUM = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
connection.execute("VACUUM")
connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
"""


@dataclasses.dataclass(frozen=True)
class Erased:
    """`left` names what still holds something of the forgotten images; `proof` is sha256 over every file that was read, with its
    size and digest, and over the finding."""

    expired_snapshots: list[int]
    deleted_files: int
    cached_files: int
    scanned_files: int
    left: list[str]
    proof: str


def text_digest(text: str) -> str:
    """How a text is remembered that must not be kept."""
    return hashlib.sha256(text.encode()).hexdigest()


def data_files(lake: Lake, table: str) -> list[tuple[Path, bool, int]]:
    """(path, whether the newest snapshot reads it, first snapshot that did) of the Parquet files of `table` in any snapshot."""
    rows = lake.query(
        f"SELECT f.path, bool_or(f.end_snapshot IS NULL) AS live, min(f.begin_snapshot) AS begin_snapshot "
        f"FROM {METADATA}.ducklake_data_file f JOIN {METADATA}.ducklake_table t ON t.table_id = f.table_id "
        "WHERE t.table_name = $table GROUP BY f.path ORDER BY f.path",
        {"table": table},
    ).to_pylist()
    places = [(lake.data / "main" / table / Path(row["path"]).name, row["live"], row["begin_snapshot"]) for row in rows]
    return [place for place in places if place[0].exists()]


def erase(lake: Lake, image_ids: Sequence[str], text_digests: set[str], first_seen: int, tables: Sequence[str]) -> Erased:
    """Delete what the newest snapshot does not need of the files that held the images since snapshot `first_seen`, and look for
    the images (by id and by the sha256 of every stored payload) and the texts in all that remains of `tables`."""
    expired = _expire(lake, first_seen)
    before = {path for path in lake.data.rglob("*.parquet")}
    with contextlib.closing(lake._cursor()) as cursor:
        cursor.execute("CALL ducklake_cleanup_old_files('lake', cleanup_all => true)")
    lake.clean()
    _narrow_statistics(lake)
    _vacuum(lake)
    cached = _clear_caches(lake, set(image_ids))
    left, read = _scan(lake, set(image_ids), text_digests, tables)
    deleted = len(before - set(lake.data.rglob("*.parquet")))
    proof = hashlib.sha256(json.dumps({"images": sorted(image_ids), "texts": sorted(text_digests), "read": read, "left": left}).encode())
    return Erased(expired, deleted, cached, len(read), left, proof.hexdigest())


def _expire(lake: Lake, first_seen: int) -> list[int]:
    newest = lake.snapshot()
    known = lake.query("SELECT snapshot_id FROM ducklake_snapshots('lake') ORDER BY snapshot_id")["snapshot_id"].to_pylist()
    expired = [snapshot for snapshot in known if first_seen <= snapshot < newest]
    if expired:
        with contextlib.closing(lake._cursor()) as cursor:
            cursor.execute(f"CALL ducklake_expire_snapshots('lake', versions => {expired})")
    return expired


def _narrow_statistics(lake: Lake) -> None:
    """The catalog keeps the least and greatest text of each column and never narrows them: a forgotten caption may be one."""
    lake.write(
        lambda connection: connection.execute(
            f"UPDATE {METADATA}.ducklake_table_column_stats AS s SET min_value = n.min_value, max_value = n.max_value FROM ("
            "SELECT f.table_id, f.column_id, min(f.min_value) AS min_value, max(f.max_value) AS max_value "
            f"FROM {METADATA}.ducklake_file_column_stats f JOIN {METADATA}.ducklake_column c "
            "ON c.table_id = f.table_id AND c.column_id = f.column_id AND c.column_type = 'varchar' AND c.end_snapshot IS NULL "
            "GROUP BY f.table_id, f.column_id HAVING count(*) FILTER (f.value_count > 0 AND f.min_value IS NULL) = 0) n "
            "WHERE n.table_id = s.table_id AND n.column_id = s.column_id"
        )
    )


def _vacuum(lake: Lake) -> None:
    """SQLite leaves deleted rows in free pages. In another process, for two copies of SQLite in one undo each other's locks."""
    command = [sys.executable, "-c", _VACUUM, str(lake.root / "catalog.sqlite")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LakeError(f"the catalog of {lake.root} cannot be compacted: {done.stderr.strip().splitlines()[-1]}. Close other programs "
                        "that hold the lake open and run the same command again")  # fmt: skip


def _clear_caches(lake: Lake, image_ids: set[str]) -> int:
    """Delete the files of caches that name an image, or are one, as stored or as it came."""
    gone = 0
    for path in sorted(item for pattern in OPAQUE_CACHES for item in lake.files.glob(pattern)):
        gone += sum(item.is_file() for item in path.rglob("*"))
        shutil.rmtree(path)
    for sheet in sorted((lake.root / SHEETS).glob("*.html")):  # pictures and words of samples; each is one command away
        sheet.unlink()
        gone += 1
    stones = lake.query("SELECT image_id, original_sha256 FROM tombstones SEMI JOIN i USING (image_id)", i=_ids(image_ids))
    names = {text for column in stones.columns for text in column.to_pylist() if text}
    for path in sorted(item for name in CACHES for item in (lake.files / name).rglob("*") if item.is_file()):
        content = path.read_bytes()
        held = not names.isdisjoint(path.name.split(".")) or hashlib.sha256(content).hexdigest() in names
        if held or any(name in names for name in map(bytes.decode, _ID_BYTES.findall(content))):
            path.unlink()
            gone += 1
    return gone


def _ids(image_ids: set[str]) -> pa.Table:
    return pa.table({"image_id": pa.array(sorted(image_ids), pa.string())})


# --- the proof -------------------------------------------------------------------------------------------------------


def _scan(lake: Lake, image_ids: set[str], text_digests: set[str], tables: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    """(places that hold something, [path, size, sha256] of every Parquet file below data/)."""
    left, read = [], []
    for path in sorted(lake.data.rglob("*.parquet")):
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        name = path.relative_to(lake.root).as_posix()
        read.append([name, path.stat().st_size, digest])
        if path.parent.name in tables:
            left += [f"{name} ({column})" for column in _columns_that_hold(path, image_ids, text_digests)]
    bounds = lake.query(
        f"SELECT s.min_value, s.max_value FROM {METADATA}.ducklake_table_column_stats s UNION ALL "
        f"SELECT f.min_value, f.max_value FROM {METADATA}.ducklake_file_column_stats f"
    )
    texts = {text for column in bounds.columns for text in column.to_pylist() if text}
    if any(text_digest(text) in text_digests for text in texts):
        left.append("catalog.sqlite (column statistics)")
    return left, read


def _columns_that_hold(path: Path, image_ids: set[str], text_digests: set[str]) -> list[str]:
    found, file = set(), pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        rows = file.read_row_group(group)
        for name, column in zip(rows.column_names, rows.columns, strict=True):
            if name in NAMES_OF_GROUPS:
                continue
            if pa.types.is_list(column.type):
                column = pc.list_flatten(column)
            if path.parent.name == "images" and name == "bytes":
                held = any(hashlib.sha256(payload.as_buffer()).hexdigest() in image_ids for payload in column)
            elif pa.types.is_string(column.type):
                texts = [text for text in pc.unique(column).to_pylist() if text]
                held = any(not image_ids.isdisjoint(_ID.findall(text)) or text_digest(text) in text_digests for text in texts)
            else:
                held = False
            if held:
                found.add(name)
    return sorted(found)
