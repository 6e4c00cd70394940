"""What the export's steps hand to gates, and that calibration rows are drawn by SQL from the training split alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dreamlite_data.lake import Lake
from dreamlite_data.schema import rows_table
from flows import retrain

KINDS = ("recolour", "move", "remove")


@pytest.fixture()
def context(lake: Lake) -> SimpleNamespace:
    """Two datasets of 60 rows: 'edit' has far more of one kind, and a tenth of all rows is held out."""
    rows = []
    for name, task in (("t2i", "generate"), ("edit", "edit")):
        for index in range(60):
            kind = None if task == "generate" else KINDS[0] if index < 40 else KINDS[1 + index % 2]
            rows.append({"name": name, "version": 1, "row_id": f"{name}{index:02}", "task": task, "image_id": f"t{index}", "text": f"text {index}",
                         "source_image_id": None if task == "generate" else f"s{index}", "edit_type": kind,
                         "split": "heldout" if index % 10 == 0 else "train"})  # fmt: skip
    lake.append({"dataset_rows": rows_table("dataset_rows", rows)})
    datasets = {name: {"version": 1} for name in ("t2i", "edit")}
    return SimpleNamespace(lake=lake, seed=0, inputs={"curate": SimpleNamespace(outputs={"datasets": datasets})})


def test_calibration_rows_are_training_rows_of_every_kind(context, monkeypatch) -> None:
    monkeypatch.setattr("dreamlite_data.dataset.read_images", lambda lake, ids: {name: b"" for name in ids if name})
    drawn = retrain.training_rows(context, retrain.HELDOUT, 12)
    assert [row["task"] for row in drawn] == ["generate"] * 12 + ["edit"] * 12
    assert not [row["id"] for row in drawn if row["id"].endswith("0")]
    assert all((row["image"] is not None) == (row["task"] == "edit") for row in drawn)
    kinds = [int(row["id"][-2:]) for row in drawn if row["task"] == "edit"]
    assert sum(index < 40 for index in kinds) == 4  # a third, where two thirds of the rows are of that kind
    assert drawn == retrain.training_rows(context, retrain.HELDOUT, 12)
    other = retrain.training_rows(SimpleNamespace(**vars(context) | {"seed": 1}), retrain.HELDOUT, 12)
    assert {row["id"] for row in other} != {row["id"] for row in drawn}


def test_exactness_is_kept_relative_to_the_float_student() -> None:
    metrics = {"fp32/generate/generate_exact": 0.8, "int8/generate/generate_exact": 0.6, "fp32/edit/edit_exact": 0.0, "int8/edit/edit_exact": 0.0}
    assert retrain.kept_shares(metrics, "int8") == {"int8/generate/exact_kept": pytest.approx(0.75)}
