"""Benchmarks: what is in one is found by bytes, pixels, look, words or canary, and leaves the datasets by a named rule."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamlite_data import executors, refresh
from dreamlite_data.dataset import open_dataset
from dreamlite_data.lake import Lake
from dreamlite_data.operators.contamination import BenchmarkError
from dreamlite_data.settings import RefreshSettings

CANARY = "26b5c67b-86f0-4f3b-9d0a-0f5c2a1d9e77"


def _photo(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).normal(size=(160, 160, 3)).cumsum(0).cumsum(1)
    noise -= noise.min((0, 1))
    return Image.fromarray((255 * noise / noise.max((0, 1))).astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six photos with captions; what is in which benchmark is said by their names."""
    folder = tmp_path / "own"
    folder.mkdir()
    words = {
        "bytes": "a first heap of clouds", "pixels": "a second heap of clouds", "near": "a third heap of clouds",
        "words": "The Fourth, heap of CLOUDS!", "canary": f"a fifth heap of clouds {CANARY}", "clean": "a sixth heap of clouds",
    }  # fmt: skip
    for seed, (name, caption) in enumerate(words.items()):
        _photo(seed).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption)
    return folder


@pytest.fixture
def benchmarks(tmp_path: Path, folder: Path) -> list[dict]:
    pictures = tmp_path / "bench"
    pictures.mkdir()
    (pictures / "one.png").write_bytes((folder / "bytes.png").read_bytes())
    _photo(1).save(pictures / "two.png", compress_level=0)
    _photo(2).save(pictures / "three.jpg", quality=85)
    listed = tmp_path / "words.jsonl"
    listed.write_text(json.dumps({"id": "q7", "prompt": "the fourth heap of clouds"}) + "\n" + json.dumps({"guid": CANARY}) + "\n")
    return [{"name": "pictures", "path": pictures}, {"name": "words", "path": listed}]


def _settings(folder: Path, benchmarks: list[dict]) -> RefreshSettings:
    return RefreshSettings(
        scenes={"t2i_rows": 0, "edit_rows": 0}, photos={"enabled": False}, benchmarks=benchmarks,
        extra_sources=[{"name": "own", "kind": "folder", "path": folder}],
        policy={"require_scene_language": False, "min_sharpness": 0.0, "allow_unanimous": ["*"]},
    )  # fmt: skip


def _build(lake: Lake, settings: RefreshSettings) -> dict:
    refresh.ingest(lake, settings, executors.local())
    counts: dict = {}
    for names in (["quality"], ["caption"], ["verify"]):
        counts |= refresh.measure(lake, settings, executors.local(), names)
    refresh.curate(lake, settings, 0)
    return counts


def test_each_kind_of_contamination_is_found_and_nothing_else(lake: Lake, folder: Path, benchmarks: list[dict]) -> None:
    counts = _build(lake, _settings(folder, benchmarks))
    assert counts["contamination_rows"] == 12  # six images and six captions
    found = lake.query_read_only(
        "SELECT p.source_key, c.benchmark, c.entry, c.kind, c.distance FROM contamination c LEFT JOIN captions t ON t.caption_id = c.subject_id "
        "JOIN provenance p ON p.image_id = coalesce(t.image_id, c.subject_id) ORDER BY c.benchmark, c.kind"
    ).to_pylist()
    assert [(row["source_key"], row["benchmark"], row["entry"], row["kind"]) for row in found] == [
        ("bytes.png", "pictures", "one.png", "bytes"), ("near.png", "pictures", "three.jpg", "near"),
        ("pixels.png", "pictures", "two.png", "pixels"), ("canary.png", "words", "line 2", "canary"), ("words.png", "words", "q7", "text"),
    ]  # fmt: skip
    assert open_dataset(lake, "t2i").rows["row_id"].to_pylist() == ["own/clean.png"]
    rules = lake.query("SELECT DISTINCT rule FROM why_dropped WHERE dataset = 't2i'")["rule"].to_pylist()
    assert rules == ["not_in_benchmark"]


def test_without_benchmarks_nothing_is_compared_and_nothing_dropped(lake: Lake, folder: Path) -> None:
    counts = _build(lake, _settings(folder, []))
    assert counts["contamination_rows"] == 0 and len(open_dataset(lake, "t2i")) == 6


@pytest.mark.thorough
def test_a_benchmark_is_decoded_once_and_a_changed_one_again(
    lake: Lake, folder: Path, benchmarks: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings(folder, benchmarks)
    _build(lake, settings)
    decoded = []
    real = refresh.ingest.__globals__["Ingest"].__call__.__globals__["images"].decode
    monkeypatch.setattr("dreamlite_data.operators.contamination.images.decode", lambda payload: decoded.append(1) or real(payload))
    assert _build(lake, settings)["contamination_rows"] == 0 and not decoded
    _photo(5).save(Path(benchmarks[0]["path"]) / "four.png")
    assert _build(lake, settings)["contamination_rows"] == 12 and len(decoded) == 4
    assert len(lake.query("SELECT * FROM contamination")) == 6 and len(open_dataset(lake, "t2i", 1)) == 1


@pytest.mark.parametrize(("name", "content", "said"), [
    ("b.jsonl", "{broken", "the benchmark 'b' at .* line 1"),
    ("b.jsonl", '{"other": "x"}', "has none of the columns sha256"),
    ("b.csv", "phash\nxyz\n", "is not a hash of 16 hex digits"),
    ("b.xml", "<x/>", "neither a folder nor a .txt, .csv or .jsonl"),
    ("b.txt", "\n", "holds nothing to compare with"),
    (None, "", "is not at .*: correct refresh.benchmarks"),
])  # fmt: skip
def test_a_benchmark_that_cannot_be_read_is_said_plainly(lake: Lake, tmp_path: Path, name: str | None, content: str, said: str) -> None:
    path = tmp_path / (name or "absent")
    if name:
        path.write_text(content)
    with pytest.raises(BenchmarkError, match=said):
        refresh.measure(lake, RefreshSettings(benchmarks=[{"name": "b", "path": path}]), executors.local(), ["contamination"])
