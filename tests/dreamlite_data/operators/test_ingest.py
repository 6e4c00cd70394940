"""One task reads many small files, and measures them together to the rows that each would have by itself."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dreamlite_data.operators import appearance
from dreamlite_data.operators.ingest import IngestTask, ingest_task
from dreamlite_data.settings import IngestSettings
from dreamlite_data.sources.base import DigestCache, Unit
from dreamlite_data.sources.folder import FolderSource

FILES = 40


@pytest.fixture
def units(tmp_path: Path) -> tuple[Unit, ...]:
    """Pictures of several sizes, one of them broken and one there twice."""
    folder, draw = tmp_path / "own", np.random.default_rng(0)
    folder.mkdir()
    for number in range(FILES - 2):
        side = int(draw.integers(20, 200))
        Image.fromarray(draw.integers(0, 256, (side, side + 7, 3), dtype=np.uint8)).save(folder / f"{number:02d}.jpg")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (folder / "copy.jpg").write_bytes((folder / "00.jpg").read_bytes())
    return tuple(FolderSource("own", folder).units(DigestCache(tmp_path / "digests.sqlite")))


def _rows(groups: list[tuple[Unit, ...]], staging: Path) -> dict[str, list[dict]]:
    found: dict[str, list[pa.Table]] = {}
    for group in groups:
        written = ingest_task(IngestTask(group, IngestSettings(), "v", str(staging)))
        for name, path in written.files.items():
            found.setdefault(name, []).append(pq.read_table(path))
    return {name: sorted(pa.concat_tables(parts).to_pylist(), key=repr) for name, parts in found.items()}


def test_files_measured_together_have_the_rows_of_files_measured_alone(
    units: tuple[Unit, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds, real = [], appearance.values
    monkeypatch.setattr(appearance, "values", lambda samples: rounds.append(len(samples)) or real(samples))
    together = _rows([units], tmp_path / "together")
    assert len(rounds) == math.ceil((FILES - 1) / appearance.BATCH) and sum(rounds) == FILES - 1
    rounds.clear()
    alone = _rows([(unit,) for unit in units], tmp_path / "alone")
    assert len(rounds) == FILES - 1
    twice = {"images", "op_quality"}  # what both copies bring is stored once a task
    assert {name: rows for name, rows in together.items() if name not in twice} == {name: rows for name, rows in alone.items() if name not in twice}
    for name in twice:
        assert together[name] == [row for index, row in enumerate(alone[name]) if row not in alone[name][:index]]
        assert len(together[name]) == FILES - 2 == len(alone[name]) - 1
    assert [row["error"] for row in together["op_ingest"] if row["error"]] != []
