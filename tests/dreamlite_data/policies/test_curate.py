"""Verdicts in columns: digests and splits do not depend on chunks, and candidates are joined again only when they could differ."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from dreamlite_data import schema
from dreamlite_data.lake import Lake
from dreamlite_data.policies import curate
from dreamlite_data.policies.candidates import candidates_sql
from dreamlite_data.policies.policy import read_policy

CANDIDATES = (
    "SELECT image_id AS row_id, 'generate' AS task, image_id, CAST(NULL AS VARCHAR) AS source_image_id, mime AS text, "
    "CAST(NULL AS VARCHAR) AS edit_type, CAST(NULL AS FLOAT) AS edited_fraction, CAST(NULL AS BLOB) AS edit_mask, CAST(1 AS FLOAT) AS weight, "
    "image_id AS group_id, width FROM images WHERE list_contains($kinds, mime)"
)
PARAMETERS = {"kinds": ["image/png"], "least": 5, "heldout_share": 0.3}


def _policy(rule: str = "width - $least", candidates: str = CANDIDATES):
    return read_policy("trial", f"-- @candidates\n{candidates}\n-- @rule wide margin\n{rule}")


def _add(lake: Lake, *numbers: int) -> None:
    lake.append({"images": [{"image_id": f"i{number:03d}", "bytes": b"x", "mime": "image/png", "width": number, "height": 1} for number in numbers]})


def _files(lake: Lake) -> list[Path]:
    return sorted((lake.files / "candidates").glob("*"))


def test_a_new_threshold_or_rule_reads_the_candidates_that_were_kept(lake: Lake) -> None:
    _add(lake, *range(10))
    first, _ = curate.judge(lake, _policy(), PARAMETERS)
    kept = _files(lake)
    lake.append({"decisions": [{"dataset": "x", "row_id": "y"}], "steps": [{"run_id": "r", "step": "s"}]})
    second, outcome = curate.judge(lake, _policy("$least - width"), {**PARAMETERS, "least": 3})
    assert _files(lake) == kept and len(kept) == 1
    assert first["verdict"].to_pylist() == ["drop"] * 5 + ["keep"] * 5 and outcome[0][2] == 6
    assert second["row_id"].to_pylist() == sorted(second["row_id"].to_pylist())


@pytest.mark.parametrize("change", ["rows", "parameter", "candidates", "operator", "deleted"])
def test_whatever_could_change_a_candidate_joins_them_again(lake: Lake, change: str) -> None:
    _add(lake, *range(10))
    curate.judge(lake, _policy(), PARAMETERS)
    before = _files(lake)
    policy, parameters = _policy(), PARAMETERS
    if change == "rows":
        _add(lake, 11)
    elif change == "parameter":
        parameters = {**PARAMETERS, "kinds": ["image/jpeg"]}
    elif change == "candidates":
        policy = _policy(candidates=CANDIDATES.replace("width FROM", "width, height FROM"))
    elif change == "deleted":
        lake.append({"dataset_rows": [{"name": "x", "version": 1, "row_id": "a"}]})
        curate.judge(lake, policy, parameters)
        assert _files(lake) == before  # a new version changes no candidate; taking rows out of one may
        lake.write(lambda connection: connection.execute("DELETE FROM dataset_rows") and None)
    else:
        lake.append({"op_quality": [{"subject_id": "i001", "op_version": "v"}]})
    judged, _ = curate.judge(lake, policy, parameters)
    after = _files(lake)
    assert len(after) == 1 and after != before  # what is out of date goes
    assert len(judged) == {"rows": 11, "parameter": 0}.get(change, 10)


def test_a_reader_without_the_right_to_write_gets_the_same_verdicts(lake: Lake) -> None:
    _add(lake, *range(10))
    reader = Lake(lake.root, read_only=True)
    from_tables, _ = curate.judge(reader, _policy(), PARAMETERS)
    assert not _files(lake) and candidates_sql(reader, _policy(), PARAMETERS)[0].startswith("(SELECT")
    kept, _ = curate.judge(lake, _policy(), PARAMETERS)
    assert kept.equals(from_tables)


def _rows(count: int = 100) -> pa.Table:
    return schema.conform("dataset_rows", pa.table({
        "row_id": [f"r{number:03d}" for number in range(count)],
        "text": pa.array([None if number % 7 == 0 else "é" * (number % 5) for number in range(count)], pa.string()),
        "edited_fraction": pa.array([None if number % 3 else number / 7 for number in range(count)], pa.float32()),
        "edit_mask": pa.array([bytes(number % 4) if number % 2 else None for number in range(count)], pa.binary()),
    }))  # fmt: skip


def test_the_digest_is_of_the_rows_and_not_of_their_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curate, "DIGEST_ROWS", 16)
    rows = _rows()
    whole = curate.rows_digest(rows)
    pieces = pa.concat_tables([rows.slice(0, 3), rows.slice(3, 50), rows.slice(53)])
    padded = pa.concat_tables([rows.slice(90), rows]).slice(10)
    assert curate.rows_digest(pieces) == curate.rows_digest(padded) == whole


@pytest.mark.parametrize("column", ["row_id", "text", "edited_fraction", "edit_mask", "split"])
def test_the_digest_sees_every_column(column: str) -> None:
    rows = _rows()
    values = rows[column].to_pylist()
    empty = {"edited_fraction": 0.0, "edit_mask": b""}.get(column, "")
    changed = [empty if value is None else None for value in values[:1]] + values[1:]
    place = rows.schema.get_field_index(column)
    other = rows.set_column(place, rows.schema.field(column), pa.array(changed, rows.schema.field(column).type))
    assert curate.rows_digest(other) != curate.rows_digest(rows)


def test_moving_a_letter_between_rows_changes_the_digest() -> None:
    def of(texts: list[str]) -> str:
        return curate.rows_digest(schema.conform("dataset_rows", pa.table({"row_id": ["a", "b"], "text": texts})))

    assert of(["xy", "z"]) != of(["x", "yz"])
