"""Datasets of every layout are read without decoding, in units that a refresh does not read twice."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pytest

from dreamlite_data import sources
from dreamlite_data.lake import Lake
from dreamlite_data.settings import ExtraSource, IngestSettings
from dreamlite_data.sources import huggingface
from dreamlite_data.sources.base import DigestCache
from dreamlite_data.sources.mapping import MappingError
from tests.dreamlite_data.sources.tables import cell, ingest, picture, rows, write_parquet


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _dataset(first: int, count: int) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    numbers = range(first, first + count)
    return datasets.Dataset.from_dict({"image": [cell(number) for number in numbers], "caption": [f"words {number}" for number in numbers]}, features)


def _source(path: Path, **settings: object) -> sources.HuggingFaceSource:
    return sources.extra_source(ExtraSource(name="set", kind="huggingface", path=path, **settings))


def _units(source: sources.HuggingFaceSource, tmp_path: Path) -> list[sources.Unit]:
    return list(source.units(DigestCache(tmp_path / "digests.json")))


def _captions(units: list[sources.Unit]) -> list[str]:
    found = [record for unit in units for record in sources.read(unit, IngestSettings())]
    assert all(record.error is None and record.images[""].startswith(b"\x89PNG") for record in found)
    return [record.caption for record in found]


def test_a_saved_dataset_is_read_in_ranges_and_split_by_split(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": _dataset(0, 5), "test": _dataset(10, 2)})
    both.save_to_disk(tmp_path / "saved")
    units = _units(_source(tmp_path / "saved", rows_per_unit=2), tmp_path)
    assert [unit.reading.count for unit in units] == [2, 2, 1] and len({unit.digest for unit in units}) == 3
    assert _captions(units) == [f"words {number}" for number in range(5)]
    assert _captions(_units(_source(tmp_path / "saved", split="test"), tmp_path)) == ["words 10", "words 11"]
    assert _captions(_units(_source(tmp_path / "saved", limit_rows=3), tmp_path)) == ["words 0", "words 1", "words 2"]
    with pytest.raises(huggingface.DatasetUnavailable, match="has no split 'dev', it has train, test"):
        _units(_source(tmp_path / "saved", split="dev"), tmp_path)


def test_a_single_saved_split_needs_no_name(tmp_path: Path) -> None:
    _dataset(0, 2).save_to_disk(tmp_path / "saved")
    assert _captions(_units(_source(tmp_path / "saved"), tmp_path)) == ["words 0", "words 1"]


def test_a_folder_of_parquet_is_read_file_by_file_and_only_the_new_one_on_refresh(lake: Lake, tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    _dataset(0, 3).to_parquet(folder / "train-00000-of-00002.parquet")
    source = {"name": "set", "kind": "huggingface", "path": tmp_path / "hub"}
    counts = ingest(lake, source)
    assert (counts["units"], counts["records"], counts["failed"]) == (1, 3, 0)
    _dataset(3, 2).to_parquet(folder / "train-00001-of-00002.parquet")
    counts = ingest(lake, source)
    assert (counts["units"], counts["pending"], counts["records"]) == (2, 1, 2)
    assert ingest(lake, source)["pending"] == 0
    texts = rows(lake, "SELECT c.text FROM current_ingest r JOIN captions c USING (caption_id) ORDER BY text")
    assert [row["text"] for row in texts] == [f"words {number}" for number in range(5)]


def test_an_image_folder_is_streamed_in_ranges(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    lines = []
    for number in range(5):
        (folder / f"{number}.png").write_bytes(picture(number))
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"words {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    source = _source(tmp_path / "images", rows_per_unit=2)
    units = _units(source, tmp_path)
    assert [unit.reading.count for unit in units] == [2, 2, 1] and {unit.kind for unit in units} == {"stream"}
    assert sorted(_captions(units)) == [f"words {number}" for number in range(5)]
    assert [unit.digest for unit in _units(source, tmp_path)] == [unit.digest for unit in units]
    (folder / "3.png").write_bytes(picture(33))
    assert [unit.digest for unit in _units(source, tmp_path)] != [unit.digest for unit in units]


def test_edit_sets_are_read_through_their_mapping(lake: Lake, tmp_path: Path) -> None:
    row = {"input": "i", "input_image": cell(1), "edit": "e", "inverse_edit": "back", "output": "o", "output_image": cell(2)}
    features = datasets.Features({name: datasets.Image() if name.endswith("image") else datasets.Value("string") for name in row})
    datasets.Dataset.from_list([row], features).save_to_disk(tmp_path / "saved")
    counts = ingest(lake, {"name": "set", "kind": "huggingface", "path": tmp_path / "saved", "mapping": "hq_edit"})
    assert (counts["records"], counts["failed"]) == (2, 0) and lake.count("edits") == 2
    with pytest.raises(MappingError, match="'MagicBrush' takes"):
        _units(_source(tmp_path / "saved", mapping="magicbrush"), tmp_path)


class _Hub:
    """A hub dataset as `datasets` describes it: addresses of files at a commit, or a stream of rows."""

    def __init__(self, commit: str, files: tuple[str, ...], rows: int | None = None) -> None:
        self.config = SimpleNamespace(data_files={"train": [f"hf://datasets/owner/name@{commit}/data/{file}" for file in files]})
        self.info = SimpleNamespace(splits={"train": SimpleNamespace(num_examples=rows)} if rows else None)
        self.hash = "h"


def test_hub_parquet_is_known_by_its_commit_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ("train-0.parquet", "train-1.parquet")
    names = pa.schema([("image", pa.binary()), ("text", pa.string())])
    monkeypatch.setattr(huggingface, "footer", lambda file: (names, 3))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **options: _Hub("c1", files))
    first = _units(_source(Path("owner/name")), tmp_path)
    assert [unit.shard for unit in first] == ["data/train-0.parquet", "data/train-1.parquet"] and all(unit.remote for unit in first)
    assert [unit.digest for unit in _units(_source(Path("owner/name")), tmp_path)] == [unit.digest for unit in first]
    assert [unit.reading.stop_row for unit in _units(_source(Path("owner/name"), limit_rows=4), tmp_path)] == [None, 1]
    assert [unit.reading.stop_row for unit in _units(_source(Path("owner/name"), limit_rows=3), tmp_path)] == [None]
    with pytest.raises(MappingError, match="'HQ-Edit' takes"):
        _units(_source(Path("owner/name"), mapping="hq_edit"), tmp_path)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **options: _Hub("c2", files))
    assert not {unit.digest for unit in _units(_source(Path("owner/name")), tmp_path)} & {unit.digest for unit in first}


def test_hub_ranges_are_known_by_commit_and_range_and_a_broken_stream_is_read_again(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"image": cell(number), "text": f"words {number}"} for number in range(5)]
    broken = {4}
    asked: list[int] = []

    class Stream:
        def __init__(self, first: int = 0, stop: int = 5) -> None:
            self.first, self.stop = first, stop

        def skip(self, count: int) -> Stream:
            return Stream(self.first + count, self.stop)

        def take(self, count: int) -> Stream:
            asked.append(self.first)
            return Stream(self.first, min(self.stop, self.first + count))

        def __iter__(self):
            for number in range(self.first, self.stop):
                if number in broken:
                    raise ConnectionError("the hub went away")
                yield lines[number]

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **options: _Hub("c1", ("a.jsonl",), rows=5))
    monkeypatch.setattr(huggingface, "open_stream", lambda *args: Stream())
    source = {"name": "set", "kind": "huggingface", "path": Path("owner/name"), "rows_per_unit": 2}
    counts = ingest(lake, source)
    assert (counts["units"], counts["records"], counts["quarantined"], asked) == (3, 4, 1, [0, 2, 4])
    broken.clear()
    counts = ingest(lake, source)
    assert (counts["pending"], counts["records"], counts["quarantined"], asked) == (1, 1, 0, [0, 2, 4, 4])
    assert ingest(lake, source)["pending"] == 0


def test_what_is_not_there_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no file or folder at"):
        _source(tmp_path / "absent")
    with pytest.raises(huggingface.DatasetUnavailable, match="cannot be opened as a dataset.*check the network and HF_TOKEN"):
        _units(_source(Path("owner/name-that-is-not-there")), tmp_path)
    write_parquet(tmp_path / "p" / "x.parquet", [{"image": cell(1), "text": "a"}])
    with pytest.raises(huggingface.DatasetUnavailable, match="has no split 'dev', it has train"):
        _units(_source(tmp_path / "p", split="dev"), tmp_path)
