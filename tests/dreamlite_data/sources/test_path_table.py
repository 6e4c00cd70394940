"""Tables of image paths and folders of samples are read again only where a line, an image or a folder changed."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from dreamlite_data import sources
from dreamlite_data.lake import Lake
from dreamlite_data.settings import ExtraSource, IngestSettings
from dreamlite_data.sources.base import DigestCache
from dreamlite_data.sources.mapping import MappingError
from tests.dreamlite_data.sources.tables import ingest, picture, rows


def _line(number: int) -> str:
    return json.dumps({"file_name": f"{number}.png", "text": f"words {number}"}) + "\n"


def _table(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(picture(number))
    path = folder / "table.jsonl"
    path.write_text("".join(_line(number) for number in range(count)))
    return path


def _units(path: Path, **settings: object) -> list[sources.Unit]:
    source = sources.extra_source(ExtraSource(**{"name": "set", "kind": "jsonl", "path": path, "mapping": "image_text", "rows_per_unit": 2, **settings}))
    return list(source.units(DigestCache(path.parent / ".cache")))


def test_ranges_together_hold_each_row_once(tmp_path: Path) -> None:
    units = _units(_table(tmp_path / "set", 5))
    records = [record for unit in units for record in sources.read(unit, IngestSettings())]
    assert [(record.key, record.caption, record.images[""]) for record in records] == [(f"{n:08d}", f"words {n}", picture(n)) for n in range(5)]
    assert len(_units(tmp_path / "set" / "table.jsonl", limit_rows=3)) == 2


def test_only_the_range_of_a_new_line_or_a_changed_image_is_read(lake: Lake, tmp_path: Path) -> None:
    path = _table(tmp_path / "set", 6)
    source = {"name": "set", "kind": "jsonl", "path": path, "mapping": "image_text", "rows_per_unit": 2}
    assert ingest(lake, source)["pending"] == 3
    assert ingest(lake, source)["pending"] == 0
    with path.open("a") as handle:
        handle.write(_line(0))
    assert ingest(lake, source)["pending"] == 1
    (path.parent / "2.png").write_bytes(picture(20))
    counts = ingest(lake, source)
    assert (counts["pending"], counts["records"]) == (1, 2)
    (path.parent / "5.png").unlink()
    assert ingest(lake, source)["failed"] == 1
    assert rows(lake, "SELECT source_key, error FROM current_ingest WHERE error IS NOT NULL") == [
        {"source_key": "00000005", "error": "missing_image_file"}
    ]  # fmt: skip
    assert lake.count("op_ingest") == 7


def test_bad_lines_are_rows_and_a_bad_table_is_quarantined(lake: Lake, tmp_path: Path) -> None:
    path = _table(tmp_path / "set", 1)
    with path.open("ab") as handle:
        handle.write(b'{"file_name": \n[1, 2]\n\n{"file_name": "0.png", "text": "caf\xe9"}\n{"text": "no image"}\n')
    (tmp_path / "set" / "z.parquet").write_bytes(b"PAR1 and nothing")
    counts = ingest(lake, {"name": "set", "kind": "jsonl", "path": tmp_path / "set", "mapping": "image_text"})
    assert (counts["records"], counts["failed"], counts["quarantined"]) == (5, 4, 1)
    assert [row["error"] for row in rows(lake, "SELECT error FROM op_ingest ORDER BY source_key")] == [
        None, "bad_row", "bad_row", "bad_row", "missing_image"
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_other_tables_are_read_alike(tmp_path: Path, suffix: str) -> None:
    lines = [json.loads(line) for line in _table(tmp_path / "set", 3).read_text().splitlines()]
    path = tmp_path / "set" / f"other.{suffix}"
    path.write_text(json.dumps(lines) if suffix == "json" else "file_name,text\n" + "".join(f"{line['file_name']},{line['text']}\n" for line in lines))
    records = [record for unit in _units(path) for record in sources.read(unit, IngestSettings())]
    assert [(record.caption, record.images[""]) for record in records] == [(f"words {n}", picture(n)) for n in range(3)]


def _sample(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    for side in (0, 1):
        (folder / f"{seed}_{side}.jpg").write_bytes(picture(seed + side))
    (folder / "prompt.json").write_text(json.dumps({"caption": "a", "edit": f"edit {seed}", "output": "b"}))
    (folder / "metadata.jsonl").write_text(json.dumps({"seed": seed}) + "\n")


def test_only_new_sample_folders_are_read_and_a_broken_one_is_quarantined(lake: Lake, tmp_path: Path) -> None:
    _sample(tmp_path / "set" / "a", 10)
    _sample(tmp_path / "set" / "b", 20)
    (tmp_path / "set" / "b" / "prompt.json").write_text("{")
    source = {"name": "set", "kind": "sample_folders", "path": tmp_path / "set", "mapping": "instruct_pix2pix"}
    counts = ingest(lake, source)
    assert (counts["units"], counts["records"], counts["quarantined"]) == (2, 1, 1)
    _sample(tmp_path / "set" / "c", 30)
    counts = ingest(lake, source)
    assert (counts["pending"], counts["records"]) == (1, 1) and lake.count("edits") == 2


def test_a_mapping_without_folders_cannot_read_them(tmp_path: Path) -> None:
    with pytest.raises(MappingError, match="'HQ-Edit' of source 'x' is for kind parquet or huggingface, not 'sample_folders'"):
        sources.extra_source(ExtraSource(name="x", kind="sample_folders", path=tmp_path, mapping="hq_edit"))


def test_a_shard_that_repeats_a_key_says_so_and_keeps_the_first(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        facts = json.dumps({"instruction": "x", "task": "t"}).encode()
        for name, payload in (("1.1.0.jpg", picture(1)), ("1.2.jpg", picture(2)), ("1.2.jpg", picture(3)), ("1.json", facts)):
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    source = sources.extra_source(ExtraSource(name="set", kind="webdataset", path=tmp_path, mapping="x2edit"))
    first, second = sources.read(next(iter(source.units(DigestCache(tmp_path / "cache")))), IngestSettings())
    assert first.error is None and first.images["target"] == picture(2) and second.error == "repeated_key"
