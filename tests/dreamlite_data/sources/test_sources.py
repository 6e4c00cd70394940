"""Sources list what is there, and the small world's shards depend on nothing but their settings and seed."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from dreamlite_data import executors, refresh, scenes, sources
from dreamlite_data.lake import Lake
from dreamlite_data.settings import IngestSettings, RefreshSettings, ScenesSettings
from dreamlite_data.sources import scenes as scene_source
from dreamlite_data.sources.base import DigestCache
from tests.dreamlite_data.conftest import build, small_settings


def _shards(folder: Path, seed: int = 0, **settings: object) -> dict[str, bytes]:
    plan = scene_source.plan(ScenesSettings(**settings), seed, folder)
    for task in plan:
        scene_source.write_shard(task)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*.tar"))}


def test_shards_are_the_same_bytes_each_time_and_others_for_another_seed(tmp_path: Path) -> None:
    size = {"t2i_rows": 30, "edit_rows": 20, "shard_rows": 10}
    first, again = _shards(tmp_path / "a", **size), _shards(tmp_path / "b", **size)
    assert first == again and len(first) == 5
    assert _shards(tmp_path / "c", seed=1, **size) != first
    more = _shards(tmp_path / "d", **{**size, "t2i_rows": 40})
    assert {name: more[name] for name in first} == first  # more rows only add shards


def test_shards_are_read_back_as_the_records_they_hold(tmp_path: Path) -> None:
    _shards(tmp_path, t2i_rows=6, edit_rows=6, shard_rows=6, fault_share=0.0)
    units = list(sources.WebDatasetSource("s", tmp_path).units(DigestCache(tmp_path / "cache.json")))
    assert [unit.shard for unit in units] == ["edit/00000.tar", "t2i/00000.tar"]
    edits, plain = (sources.read(unit, IngestSettings()) for unit in units)
    assert [record.task for record in edits] == ["edit"] * 6 and [record.task for record in plain] == ["generate"] * 6
    assert all(set(record.images) == {"source", "target"} and record.metadata["instruction"] for record in edits)
    assert all(scenes.parse_caption(record.caption or "") for record in plain)


def test_clean_rows_tell_the_truth(tmp_path: Path) -> None:
    from dreamlite_data.images import decode_stored
    from dreamlite_data.operators.verify import VerifyEdit
    from tests.dreamlite_data.operators.triplets import triplet_rows

    _shards(tmp_path, t2i_rows=20, edit_rows=20, shard_rows=20, fault_share=0.0)
    for unit in sources.WebDatasetSource("s", tmp_path).units(DigestCache(tmp_path / "cache.json")):
        for record in sources.read(unit, IngestSettings()):
            if record.task == "generate":
                said = scenes.parse_caption(record.caption or "")
                assert said is not None and scenes.matches(decode_stored(record.images[""]), said)
                continue
            readings = {role: scenes.read_scene(decode_stored(payload)).scene for role, payload in record.images.items()}
            rows = triplet_rows(
                [(decode_stored(record.images["source"]), decode_stored(record.images["target"]), record.metadata["instruction"])],
                **{f"{role}_scene": [reading.to_json()] for role, reading in readings.items()},
            )
            [answer] = VerifyEdit()(rows).to_pylist()
            assert answer["matches"], answer["reason"]


def test_every_kind_of_fault_is_planted_and_named_only_beside_the_shards(tmp_path: Path) -> None:
    plan = scene_source.plan(ScenesSettings(t2i_rows=120, edit_rows=120, shard_rows=120, fault_share=0.3), 0, tmp_path)
    truth = [row for task in plan for row in scene_source.write_shard(task)]
    assert {row["fault"] for row in truth} == {*scene_source.T2I_FAULTS, *scene_source.EDIT_FAULTS}
    assert 0.2 < len(truth) / 240 < 0.4
    for file in tmp_path.rglob("*.tar"):
        with tarfile.open(file) as tar:
            assert not any("fault" in member.name for member in tar)
            assert all(b"fault" not in tar.extractfile(member).read() for member in tar.getmembers() if member.name.endswith(".json"))


def test_digests_are_read_once_and_change_with_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"one")
    cache = DigestCache(tmp_path / "cache.json")
    first = cache.digest(file)
    cache.save()
    again = DigestCache(tmp_path / "cache.json")
    monkeypatch.setattr("hashlib.file_digest", None)
    assert again.digest(file) == first  # known by size and time: not read
    monkeypatch.undo()
    file.write_bytes(b"three")
    assert again.digest(file) != first


def _extra(folder: Path) -> RefreshSettings:
    extra = ({"name": "own", "kind": "folder", "path": folder},)
    return small_settings(scenes={"t2i_rows": 0, "edit_rows": 0}, photos={"enabled": False}, extra_sources=extra)


def _save(folder: Path, name: str, seed: int) -> None:
    import numpy as np
    from PIL import Image

    folder.mkdir(exist_ok=True)
    Image.fromarray(scenes.render(scenes.sample_scene(np.random.default_rng(seed)))).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(f"picture {seed}")


def test_only_new_and_changed_files_are_read_and_vanished_ones_are_withdrawn(lake: Lake, tmp_path: Path) -> None:
    folder, executor = tmp_path / "own", executors.local()
    for name in ("a", "b", "c"):
        _save(folder, name, ord(name))
    settings = _extra(folder)
    assert refresh.ingest(lake, settings, executor)["records"] == 3
    assert refresh.ingest(lake, settings, executor)["pending"] == 0
    _save(folder, "d", 4)
    (folder / "b.txt").write_text("other words")
    (folder / "c.png").unlink()
    (folder / "c.txt").unlink()
    counts = refresh.ingest(lake, settings, executor)
    assert (counts["pending"], counts["records"], counts["withdrawn"]) == (2, 2, 1)
    rows = lake.query("SELECT r.source_key, c.text FROM current_ingest r JOIN captions c USING (caption_id) ORDER BY ALL").to_pylist()
    assert [tuple(row.values()) for row in rows] == [("a.png", "picture 97"), ("b.png", "other words"), ("d.png", "picture 4")]
    assert lake.count("images") == 4  # content is never thrown away: earlier dataset versions may name it


def test_a_source_that_is_not_mounted_is_an_error_and_withdraws_nothing(lake: Lake, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    _save(folder, "a", 1)
    refresh.ingest(lake, _extra(folder), executors.local())
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="'own' has no folder.*Nothing was withdrawn"):
        refresh.ingest(lake, _extra(folder), executors.local())
    assert lake.count("op_ingest") == 1


@pytest.mark.thorough
def test_two_worlds_live_in_one_lake_without_disturbing_each_other(lake: Lake) -> None:
    settings = small_settings(photos={"enabled": False})
    first = build(lake, settings, seed=0)
    build(lake, settings, seed=1)
    again = refresh.curate(lake, settings, seed=0)
    assert [row["digest"] for row in again] == [row["digest"] for row in first]


def test_a_photo_is_exported_no_larger_than_asked(tmp_path: Path) -> None:
    from PIL import Image, UnidentifiedImageError

    from dreamlite_data.sources import photos

    assert photos.export(tmp_path, 80) > 20
    sides = []
    for file in tmp_path.iterdir():
        if file.suffix in (".txt", ".json"):
            continue
        try:
            with Image.open(file) as image:
                sides.append(max(image.size))
        except UnidentifiedImageError:
            assert file.name == "multipage_rgb.tif"  # what Pillow cannot read goes out unread, for ingest to report
        assert json.loads(file.with_suffix(".json").read_text())["licence"]
    assert max(sides) == 80
