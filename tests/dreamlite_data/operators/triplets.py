"""Triplets as the operators that verify them read them, with nulls for all that a test does not say; and their judgement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from dreamlite_data.images import encode_png
from dreamlite_data.operators.change import encode_mask
from dreamlite_data.operators.verify import VerifyEdit
from dreamlite_data.operators.verify_cases import Case
from dreamlite_data.operators.verify_triplet import Inputs, VerifyTriplet

GIVEN = {
    "target_scene": pa.string(), "clip_target": pa.float64(), "clip_direction": pa.float64(), "source_words": pa.list_(pa.string()),
    "source_text": pa.float32(), "target_words": pa.list_(pa.string()), "target_text": pa.float32(), "vqa_yes": pa.bool_(),
}  # fmt: skip


def triplet_rows(pairs: Sequence[tuple[np.ndarray, np.ndarray, str]], **columns: Sequence) -> pa.Table:
    """Rows for VerifyEdit of (source, target, instruction)."""
    count = len(pairs)
    given = {
        "edit_id": [f"{number}" for number in range(count)], "instruction": [words for _, _, words in pairs],
        "source_bytes": [encode_png(source) for source, _, _ in pairs], "target_bytes": [encode_png(target) for _, target, _ in pairs],
        "mask_png": pa.nulls(count, pa.binary()), **{name: pa.nulls(count, pa.string()) for name in ("edit_type", "origin", "source_scene", "target_scene")},
    }  # fmt: skip
    return pa.table(given | {name: pa.array(list(values), pa.string()) if name.endswith("_scene") else values for name, values in columns.items()})


def case_rows(cases: Sequence[Case], **columns: Sequence) -> pa.Table:
    """Rows for VerifyEdit of cases of a truth set."""
    given = {
        "edit_type": [case.edit_type for case in cases], "origin": [case.origin for case in cases],
        "mask_png": pa.array([encode_mask(case.mask) if case.mask is not None else None for case in cases], pa.binary()),
    }  # fmt: skip
    return triplet_rows([(case.source, case.target, case.instruction) for case in cases], **given | columns)


def verdicts(rows: pa.Table, **given: Sequence) -> list[dict]:
    """What VerifyTriplet says of what VerifyEdit measured of `rows`; `given` are columns of other operators."""
    measures = judged_rows(rows, **given)
    return VerifyTriplet(Inputs("m"))(measures).to_pylist()


def judged_rows(rows: pa.Table, **given: Sequence) -> pa.Table:
    """Rows for VerifyTriplet."""
    operator = VerifyEdit()
    measured = operator.side_tables(rows, operator(rows))["op_triplet_measures"]
    columns = {name: rows[name] for name in ("edit_id", "instruction", "edit_type", "origin", "source_scene")}
    others = {name: pa.array(list(given[name]), kind) if name in given else pa.nulls(len(rows), kind) for name, kind in GIVEN.items()}
    return pa.table({**columns, "measures": pa.array(measured.to_pylist(), pa.struct(list(measured.schema))), **others})
