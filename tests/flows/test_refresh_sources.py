"""The key of the ingest step follows what a user's sources hold: their files, their mapping, the commit of a hub dataset."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

import flows.refresh
from dreamlite_data.settings import ExtraSource
from dreamlite_data.sources import extra
from flows.config import load_config
from flows.key import folder_digest
from flows.refresh import refresh_steps, source_digest


def _source(path: Path, **settings: object) -> ExtraSource:
    return ExtraSource(name="own", path=path, **settings)


def test_a_plain_folder_is_known_by_its_content_alone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"1")
    assert source_digest(_source(tmp_path, kind="folder")) == folder_digest(tmp_path)


def test_a_single_file_counts_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text("one")
    source = _source(path, kind="jsonl", mapping="nhr_edit")
    first = source_digest(source)
    assert source_digest(source) == first
    path.write_text("two")
    assert source_digest(source) != first


def test_another_text_of_the_mapping_and_other_images_count(tmp_path: Path) -> None:
    mapping, images = tmp_path / "m.yaml", tmp_path / "images"
    images.mkdir()
    (tmp_path / "x.jsonl").write_text("one")
    text = "name: m\nlayouts: [jsonl]\ntask: generate\nimages: {image: file}\n"
    mapping.write_text(text)
    source = _source(tmp_path / "x.jsonl", kind="jsonl", mapping=str(mapping), image_root=images)
    seen = [source_digest(source)]
    mapping.write_text(text + "# only a comment\n")
    assert source_digest(source) == seen[0]
    mapping.write_text(text + "caption: words\n")
    seen.append(source_digest(source))
    (images / "a.png").write_bytes(b"1")
    seen.append(source_digest(source))
    mapping.write_text("name: [")
    seen.append(source_digest(source))  # planning goes on: reading the source will say what is wrong
    assert len(set(seen)) == 4


def test_a_hub_dataset_is_known_by_its_name_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    commits = iter(["c1", "c1", "c2"])
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, *a, **k: type("Info", (), {"sha": next(commits)}))
    source = _source(Path("owner/name"), kind="huggingface")
    assert source_digest(source) == source_digest(source) != source_digest(source)
    pinned = _source(Path("owner/name"), kind="huggingface", revision="a" * 40)
    assert extra.hub_commit(pinned) == "a" * 40  # asks nobody
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, *a, **k: (_ for _ in ()).throw(ConnectionError("no network")))
    assert extra.hub_commit(source) == "main"
    assert source_digest(source) != source_digest(_source(Path("owner/other"), kind="huggingface"))


def test_a_table_of_urls_is_looked_at_each_day_and_one_of_files_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on(day: int, path: Path) -> str:
        monkeypatch.setattr(flows.refresh, "datetime", SimpleNamespace(now=lambda zone: datetime(2026, 1, day, tzinfo=zone)))
        return source_digest(_source(path, kind="jsonl", mapping="image_text"))

    for name, image, changes in (("urls.jsonl", "https://a.example/1.png", True), ("files.jsonl", "1.png", False)):
        path = tmp_path / name
        path.write_text(f'{{"file_name": "{image}", "text": "words"}}\n')
        assert on(1, path) == on(1, path)
        assert (on(1, path) != on(2, path)) == changes


def test_edit_sources_are_in_the_key_of_the_step_that_edits_and_of_no_other(tmp_path: Path) -> None:
    source = f"refresh.extra_sources=[{{name: mine, kind: folder, path: '{tmp_path}'}}]"
    default, own = (
        {step.name: step.spec for step in refresh_steps(load_config("smoke", [source, *more]))} for more in ([], ["refresh.edit_sources=[photos, mine]"])
    )
    assert [name for name in default if default[name] != own[name]] == ["caption"]
    assert "edit_sources" not in default["caption"]  # so that a run of before is not done again
