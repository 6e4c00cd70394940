"""Pending rows are the same rows in the same order, however many ranges of ids they are sorted in."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamlite_data import schema
from dreamlite_data.lake import Lake
from dreamlite_data.operators import run

SUBJECTS = "SELECT caption_id, text FROM captions"


@pytest.mark.parametrize("named", [lambda n: hashlib.sha256(str(n).encode()).hexdigest(), lambda n: f"one_head/{n:03}", "abc{}é".format])
@pytest.mark.parametrize(("at_once", "least_files"), [(1000, 1), (7, 2), (1, 2)])
def test_files_of_pending_rows_are_the_pending_rows(named, at_once: int, least_files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ROWS_SORTED", at_once)
    ids = [named(number) for number in range(60)]
    with Lake(tmp_path / "lake") as lake:
        lake.append({
            "captions": schema.rows_table("captions", [{"caption_id": name, "text": f"of {name}"} for name in ids]),
            "op_contamination": schema.rows_table("op_contamination", [{"subject_id": name, "op_version": "now"} for name in ids[:20]]),
        })  # fmt: skip
        expected = run.pending(lake, SUBJECTS, "op_contamination", "now")
        assert expected["caption_id"].to_pylist() == sorted(ids[20:])
        with run.pending_files(lake, SUBJECTS, "op_contamination", "now") as paths:
            assert pa.concat_tables(map(pq.read_table, paths)).equals(expected)
            assert len(paths) >= (least_files if len({name[: run.ID_HEAD] for name in ids}) > 1 else 1)
            largest = max(pq.read_metadata(path).num_rows for path in paths)
            assert largest <= at_once or len({name[: run.ID_HEAD] for name in ids}) < 40
        with run.pending_files(lake, SUBJECTS.replace("FROM captions", "FROM captions WHERE false"), "op_contamination", "now") as paths:
            assert paths == []
        assert not list(lake.staging.iterdir())


def test_what_is_done_of_rows_that_are_gone_hides_no_pending_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ROWS_SORTED", 2)
    ids = [f"{number:04}" for number in range(9)]
    done = [f"{name}/gone" for name in ids[:7] for _ in range(2)]
    with Lake(tmp_path / "lake") as lake:
        lake.append({
            "captions": schema.rows_table("captions", [{"caption_id": name, "text": "any"} for name in ids]),
            "op_contamination": schema.rows_table("op_contamination", [{"subject_id": name, "op_version": "now"} for name in done]),
        })  # fmt: skip
        with run.pending_files(lake, SUBJECTS, "op_contamination", "now") as paths:
            assert pa.concat_tables(map(pq.read_table, paths))["caption_id"].to_pylist() == ids
