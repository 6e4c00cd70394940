"""Measure how stored images look, for those that did not come through ingest (targets of edits, an older version's rows).
Ingest writes the same rows from its own decode; both call `appearance`, so the values are equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dreamlite_data import schema
from dreamlite_data.images import decode_stored
from dreamlite_data.operators.appearance import RECIPE, Appearance, TooSmall


class Quality:
    """Operator over stored images."""

    name = "quality"
    version = 2
    reads = ("image_id", "bytes")
    table = "op_quality"
    resources = {"num_cpus": 1.0}
    schema = schema.OPERATORS["op_quality"]

    def config(self) -> dict[str, Any]:
        return dict(RECIPE)

    def __call__(self, rows: pa.Table) -> pa.Table:
        ids = rows["image_id"].to_pylist()
        looks, errors = Appearance(), [None] * len(ids)
        for index, payload in enumerate(rows["bytes"]):
            try:
                looks.add(decode_stored(payload.as_py()))
            except Exception as error:  # the contract: a bad row is a result
                errors[index] = said(error)
        return quality_rows(ids, looks, errors)


def said(error: Exception) -> str:
    """An exception as the error of a row."""
    return f"{type(error).__name__}: {error}"[:500] if not isinstance(error, TooSmall) else str(error)


def quality_rows(ids: Sequence[str], looks: Appearance, errors: Sequence[str | None]) -> pa.Table:
    """Rows of op_quality, one per id; the images of `looks` belong, in order, to the ids without an error."""
    good = pa.array([None if error else place for place, error in zip(_places(errors), errors, strict=True)], pa.int64())
    columns: dict[str, pa.Array] = {"subject_id": pa.array(ids, pa.string()), "error": pa.array(errors, pa.string())}
    for name, values in looks.measures().items():
        kind = Quality.schema.field(name).type
        column = pa.array(np.asarray(values).astype(kind.to_pandas_dtype()) if kind != pa.string() else values, kind)
        columns[name] = column.take(good)
    return schema.conform("op_quality", pa.table(columns))


def _places(errors: Sequence[str | None]) -> list[int]:
    return (np.cumsum([error is None for error in errors], dtype=np.int64) - 1).tolist()
