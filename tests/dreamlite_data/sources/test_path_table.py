"""Tables of image paths and folders of samples are read again only where a line, an image or a folder changed."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamlite_data import executors, refresh, sources
from dreamlite_data.lake import Lake
from dreamlite_data.settings import ExtraSource, IngestSettings
from dreamlite_data.sources.base import DigestCache
from dreamlite_data.sources.mapping import MappingError
from tests.dreamlite_data.sources.tables import encoded, ingest, picture, rows, settings_of


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


def test_a_corrected_licence_or_origin_is_on_every_row(lake: Lake, tmp_path: Path) -> None:
    source = {"name": "set", "kind": "jsonl", "path": _table(tmp_path / "set", 4), "mapping": "image_text", "rows_per_unit": 2}
    ingest(lake, source)
    for told in ({"licence": "CC-BY-4.0"}, {"licence": "CC0-1.0", "origin": "mine"}):
        assert ingest(lake, source | told)["pending"] == 2 and ingest(lake, source | told)["pending"] == 0
        found = rows(lake, "SELECT licence, origin, count(*) AS n FROM provenance GROUP BY ALL")
        assert [(row["licence"], row["n"]) for row in found] == [(told["licence"], 4)] and told.get("origin") in (None, found[0]["origin"])


def test_a_corrected_type_and_mask_of_a_triplet_take_the_place_of_the_first_and_are_judged_anew(lake: Lake, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    mapping = tmp_path / "ours.yaml"
    mapping.write_text(
        "name: ours\nlayouts: [jsonl]\ntask: edit\nimages: {source: source, target: target}\nmask: {column: mask, marks: white}\n"
        "instruction: instruction\nedit_type: kind\nedit_types: {add: object/add, remove: object/remove}\n"
    )
    for number in range(4):
        (folder / f"{number}.png").write_bytes(picture(number))
    for name, left in (("left", 255), ("right", 0)):
        half = np.full((16, 24), 255 - left, np.uint8)
        half[:, :12] = left
        (folder / f"{name}.png").write_bytes(encoded(Image.fromarray(half)))

    def write(kind: str, mask: str) -> None:
        lines = [{"source": "0.png", "target": "1.png", "instruction": "change it", "kind": kind, "mask": f"{mask}.png"},
                 {"source": "2.png", "target": "3.png", "instruction": "change that", "kind": "add", "mask": "left.png"}]  # fmt: skip
        (folder / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    source = {"name": "set", "kind": "jsonl", "path": folder / "t.jsonl", "mapping": str(mapping), "rows_per_unit": 2}
    settings, executor = settings_of(source), executors.local()

    def run() -> dict[str, int]:
        refresh.ingest(lake, settings, executor)
        return refresh.measure(lake, settings, executor, ["quality", "edit", "caption", "verify"])

    write("add", "left")
    run()
    first = rows(lake, "SELECT edit_id, edit_type, mask_fraction, mask_png FROM edits JOIN edit_masks USING (edit_id) ORDER BY edit_id")
    assert [row["edit_type"] for row in first] == ["object/add"] * 2
    write("remove", "right")
    assert run()["verify_edit_rows"] == 1, "the corrected one alone"
    then = rows(lake, "SELECT edit_id, edit_type, mask_fraction, mask_png FROM edits JOIN edit_masks USING (edit_id) ORDER BY edit_id")
    assert sorted(row["edit_type"] for row in then) == ["object/add", "object/remove"]
    assert sum(one["mask_png"] != two["mask_png"] for one, two in zip(first, then, strict=True)) == 1
    assert run()["verify_edit_rows"] == 0
    judged = rows(lake, "SELECT count(*) AS n, count(DISTINCT subject_id) AS ids FROM current_verify_triplet")[0]
    assert (judged["n"], judged["ids"]) == (2, 2)
