"""A Parquet file is read once, a large one in units of row groups, and whatever is wrong in it costs its row or its unit alone."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamlite_data import images, sources
from dreamlite_data.lake import Lake
from dreamlite_data.settings import ExtraSource, IngestSettings
from dreamlite_data.sources import parquet
from dreamlite_data.sources.base import DigestCache
from tests.dreamlite_data.sources.tables import cell, ingest, picture, rows, write_parquet


def _img2dataset(number: int) -> dict:
    """A row as img2dataset writes it."""
    return {"key": f"{number:09d}", "jpg": picture(number), "caption": f"words {number}", "url": f"https://example.org/{number}", "status": "success"}


def _units(folder: Path, **settings: object) -> list[sources.Unit]:
    source = sources.extra_source(ExtraSource(name="set", kind="parquet", path=folder, **settings))
    return list(source.units(DigestCache(folder / "cache.json")))


def test_img2dataset_output_is_read_with_captions_urls_and_licence(lake: Lake, tmp_path: Path) -> None:
    write_parquet(tmp_path / "00000.parquet", [_img2dataset(number) for number in range(5)], row_group_size=2)
    counts = ingest(lake, {"name": "web", "kind": "parquet", "path": tmp_path, "licence": "CC0-1.0", "origin": "LAION"})
    assert (counts["units"], counts["records"], counts["failed"]) == (1, 5, 0)
    found = rows(lake, "SELECT c.text, p.url, p.licence, p.origin FROM provenance p JOIN captions c USING (image_id) ORDER BY text")
    assert found[3] == {"text": "words 3", "url": "https://example.org/3", "licence": "CC0-1.0", "origin": "LAION"}


def test_a_refresh_reads_only_new_and_changed_files(lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        write_parquet(tmp_path / f"{name}.parquet", [{"image": cell(ord(name)), "text": name}])
    source = {"name": "set", "kind": "parquet", "path": tmp_path}
    ingest(lake, source)
    decodes: list[int] = []
    real = images.decode
    monkeypatch.setattr(images, "decode", lambda payload, limits=None: decodes.append(1) or real(payload, limits))
    assert ingest(lake, source)["pending"] == 0 and not decodes
    write_parquet(tmp_path / "c.parquet", [{"image": cell(3), "text": "c"}])
    write_parquet(tmp_path / "b.parquet", [{"image": cell(4), "text": "other"}])
    counts = ingest(lake, source)
    assert (counts["pending"], counts["records"], len(decodes)) == (2, 2, 2)
    texts = rows(lake, "SELECT c.text FROM current_ingest r JOIN captions c USING (caption_id) ORDER BY ALL")
    assert [row["text"] for row in texts] == ["a", "c", "other"]
    (tmp_path / "a.parquet").unlink()
    assert ingest(lake, source)["withdrawn"] == 1 and lake.count("op_ingest") == 2


def test_bad_rows_and_bad_files_lose_nothing_else(lake: Lake, tmp_path: Path) -> None:
    names = pa.array([b"good", b"caf\xe9", b"good too", b"no image"], pa.binary()).view(pa.string())  # the second is no UTF-8
    cells = pa.array([cell(1), cell(2), {"bytes": b"\x89PNG nothing", "path": None}, None])
    tmp_path.joinpath("data").mkdir()
    pq.write_table(pa.table({"image": cells, "text": names}), tmp_path / "data" / "rows.parquet")
    whole = (tmp_path / "data" / "rows.parquet").read_bytes()
    (tmp_path / "data" / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "data" / "z_other.parquet").write_bytes(write_parquet(tmp_path / "other.parquet", [{"text": "no image column"}]).read_bytes())
    counts = ingest(lake, {"name": "set", "kind": "parquet", "path": tmp_path / "data", "mapping": str(_mapping(tmp_path))})
    assert (counts["records"], counts["failed"], counts["quarantined"]) == (4, 3, 2)
    errors = rows(lake, "SELECT source_key, error FROM op_ingest ORDER BY ALL")
    assert [row["error"] for row in errors] == [None, "bad_row", "not_an_image", "missing_image"]
    reasons = {row["shard"]: row["error"] for row in rows(lake, "SELECT shard, error FROM op_shard WHERE error IS NOT NULL")}
    assert "not a readable Parquet file" in reasons["cut.parquet"] and "lacks" in reasons["z_other.parquet"]


def _mapping(folder: Path, more: str = "") -> Path:
    path = folder / "m.yaml"
    path.write_text(f"name: m\norigin: o\nlayouts: [parquet]\ntask: generate\nimages: {{image: image}}\ncaption: text\n{more}")
    return path


def test_a_large_file_is_several_units_that_together_hold_each_row_once(lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big.parquet"
    write_parquet(path, [{"image": {"bytes": picture(number, (240, 240)), "path": None}, "text": str(number)} for number in range(16)], row_group_size=2)
    units = _units(tmp_path, unit_mb=1)
    assert path.stat().st_size > 2 * 2**20 and len(units) == 3 and len({unit.digest for unit in units}) == 3
    keys = [record.key for unit in units for record in sources.read(unit, IngestSettings())]
    assert keys == [f"{number:08d}" for number in range(16)]
    assert [unit.shard for unit in _units(tmp_path)] == ["big.parquet"]


def test_a_limit_takes_the_first_rows_and_gives_later_files_no_new_digest(tmp_path: Path) -> None:
    for name in "abc":
        write_parquet(tmp_path / f"{name}.parquet", [{"image": cell(number), "text": name} for number in range(4)], row_group_size=3)
    units = _units(tmp_path, limit_rows=6)
    assert [len(sources.read(unit, IngestSettings())) for unit in units] == [4, 2]
    more = _units(tmp_path, limit_rows=7)
    assert more[0].digest == units[0].digest and more[1].digest != units[1].digest


def test_only_mapped_columns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", [{"image": cell(1), "text": "a", "huge": b"x" * 1000, "embedding": [0.0] * 100}])
    asked: list[list[str]] = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, i, columns=None, **k: asked.append(columns) or real(self, i, columns=columns, **k))
    sources.read(_units(tmp_path)[0], IngestSettings())
    assert asked == [["image", "text"]]


def test_large_row_groups_are_noted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", [{"image": cell(number), "text": "a"} for number in range(3)])
    assert not any(record.notes for record in sources.read(_units(tmp_path)[0], IngestSettings()))
    monkeypatch.setattr(parquet, "LARGE_GROUP_MB", 0)
    notes = [record.notes for record in sources.read(_units(tmp_path)[0], IngestSettings())]
    assert "large_row_group" in notes[0][0] and notes[1:] == [[], []]


def test_another_mapping_reads_again_and_takes_the_old_rows_away(lake: Lake, tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "a.parquet", [{"image": cell(1), "text": "a", "score": 1.5}])
    source = {"name": "set", "kind": "parquet", "path": tmp_path / "data", "mapping": str(_mapping(tmp_path))}
    ingest(lake, source)
    for name in ("score", "renamed"):  # the second time a record with scores is read again: its rows must not stand twice
        _mapping(tmp_path, f"scores: {{{name}: score}}\n")
        counts = ingest(lake, source)
        assert counts["pending"] == 1 and lake.count("op_ingest") == 1
        assert [tuple(row.values()) for row in rows(lake, "SELECT name, value FROM provider_scores")] == [(name, 1.5)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "jsonl"}, "needs a mapping"),
        ({"kind": "folder", "mapping": "hq_edit"}, "takes no mapping: that is for kind webdataset or parquet"),
        ({"kind": "parquet", "config": "x"}, "of kind 'parquet' takes no config: that is for kind huggingface"),
        ({"kind": "webdataset", "limit_rows": 1}, "takes no limit_rows"),
        ({"kind": "parquet", "limit_row": 1}, "did you mean 'limit_rows'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_sentence(tmp_path: Path, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ExtraSource(name="x", path=tmp_path, **settings)


def test_a_mapping_for_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'X2Edit' of source 'x' is for kind webdataset, not 'parquet'"):
        sources.extra_source(ExtraSource(name="x", kind="parquet", path=tmp_path, mapping="x2edit"))


@pytest.mark.thorough
def test_executors_and_workers_change_no_byte(empty_lake: Path, tmp_path: Path) -> None:
    import shutil

    from dreamlite_data import executors, refresh
    from tests.dreamlite_data.conftest import contents
    from tests.dreamlite_data.sources.tables import settings_of

    for name in "abc":
        row = {"input": "i", "input_image": cell(ord(name)), "edit": "e", "inverse_edit": "back", "output": "o", "output_image": cell(7)}
        write_parquet(tmp_path / "data" / f"{name}.parquet", [row])
    settings = settings_of({"name": "set", "kind": "parquet", "path": tmp_path / "data", "mapping": "hq_edit"})
    found = []
    for workers in (1, 2):
        shutil.copytree(empty_lake, tmp_path / f"lake{workers}")
        with Lake(tmp_path / f"lake{workers}") as lake, executors.local(workers) as executor:
            refresh.ingest(lake, settings, executor)
            found.append(contents(lake))
    assert found[0] == found[1] and len(found[0]["edits"]) == 6
