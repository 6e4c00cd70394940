"""A list of URLs becomes images with their provenance; what failed is a row with its reason, and only failures are asked again."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamlite_data import downloads, images, sources
from dreamlite_data.lake import Lake
from dreamlite_data.settings import ExtraSource
from dreamlite_data.sources.base import DigestCache
from dreamlite_data.sources.mapping import MappingError
from tests.dreamlite_data.sources.tables import ingest, picture, rows
from tests.dreamlite_data.sources.web import Web, serving

POLITE = {"private_networks": ["127.0.0.1/32"], "host_interval_s": 0, "retry_pause_s": 0, "max_file_mb": 1, "timeout_s": 5, "tries_per_run": 1}


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as server:
        yield server


def _list(path: Path, *lines: dict) -> dict:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"name": "web", "kind": "url_list", "path": path, "licence": "CC0-1.0"}


def _ingest(lake: Lake, source: dict, **changes: object) -> dict:
    return ingest(lake, source, downloads={**POLITE, **changes})


def _records(lake: Lake) -> dict[str, tuple]:
    found = rows(lake, "SELECT source_key, error, image_id FROM current_ingest")
    return {row["source_key"].rpartition(":")[2].partition("/")[2]: (row["error"], row["image_id"]) for row in found}


def test_each_row_is_an_image_with_its_url_or_a_failure_with_its_reason(lake: Lake, tmp_path: Path, web: Web) -> None:
    urls = ["ok/1", "ok/2", "404/a", "robots/noai", "endless/a", "loop/0"]
    source = _list(tmp_path / "list.jsonl", *({"url": web.url(path), "caption": f"words {path}"} for path in urls), {"caption": "no url"})
    counts = _ingest(lake, source)
    assert (counts["urls"], counts["asked"], counts["download_failed"], counts["records"], counts["failed"]) == (6, 6, 4, 7, 5)
    found = rows(lake, "SELECT p.url, p.licence, c.text FROM provenance p JOIN captions c USING (image_id) ORDER BY url")
    assert found == [{"url": web.url(f"ok/{n}"), "licence": "CC0-1.0", "text": f"words ok/{n}"} for n in (1, 2)]
    errors = {row["source_key"]: row["error"] for row in rows(lake, "SELECT source_key, error FROM op_ingest WHERE error IS NOT NULL")}
    assert errors == {web.url("404/a"): "http_404", web.url("robots/noai"): "opt_out", web.url("endless/a"): "too_large",
                      web.url("loop/0"): "too_many_redirects", "row 6": "bad_row"}  # fmt: skip
    kept = rows(lake, "SELECT subject_id, status, size_bytes, sha256, etag FROM op_download WHERE error IS NULL ORDER BY subject_id")
    assert kept[0] == {"subject_id": web.url("ok/1"), "status": 200, "size_bytes": len(picture(1)),
                       "sha256": hashlib.sha256(picture(1)).hexdigest(), "etag": '"1"'}  # fmt: skip


def test_only_passing_failures_are_asked_again_and_only_a_limited_number_of_times(lake: Lake, tmp_path: Path, web: Web) -> None:
    source = _list(tmp_path / "list.jsonl", *({"url": web.url(path)} for path in ("ok/1", "404/a", "flaky/a", "500/a")))
    decodes: list[int] = []
    real = images.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "decode", lambda payload, limits=None: decodes.append(1) or real(payload, limits))
        assert _ingest(lake, source, max_tries=3)["asked"] == 4
        counts = _ingest(lake, source, max_tries=3)
        assert (counts["asked"], counts["pending"], len(decodes)) == (2, 1, 2)  # the one that came late, and nothing else, is read
        assert [_ingest(lake, source, max_tries=3)["asked"] for _ in range(2)] == [1, 0]
    assert dict(web.asked) == {"ok/1": 1, "404/a": 1, "flaky/a": 2, "500/a": 3}
    assert {path: error for path, (error, _) in _records(lake).items()} == {"ok/1": None, "404/a": "http_404", "flaky/a": None, "500/a": "http_500"}
    assert _ingest(lake, source, max_tries=3, retry_permanent=True)["asked"] == 1


def test_settings_that_may_change_an_outcome_ask_the_failures_again_and_no_success(lake: Lake, tmp_path: Path, web: Web) -> None:
    source = _list(tmp_path / "list.jsonl", {"url": web.url("ok/1")}, {"url": web.url("robots/noai")})
    _ingest(lake, source)
    assert _ingest(lake, source, connections_per_host=5)["asked"] == 0
    assert _ingest(lake, source, opt_out=[])["asked"] == 1
    assert dict(web.asked) == {"ok/1": 1, "robots/noai": 2} and lake.count("op_download") == 2
    assert all(error is None for error, _ in _records(lake).values())


def test_a_stored_file_that_is_gone_is_fetched_again(lake: Lake, tmp_path: Path, web: Web) -> None:
    source = _list(tmp_path / "list.jsonl", {"url": web.url("ok/1")})
    _ingest(lake, source)
    next(file for file in downloads.folder(lake).rglob("*") if file.is_file()).unlink()
    assert _ingest(lake, source)["asked"] == 1


def test_wrong_sha256_is_a_failure_with_its_reason(lake: Lake, tmp_path: Path, web: Web) -> None:
    source = _list(tmp_path / "list.jsonl", {"url": web.url("ok/1"), "sha256": "0" * 64})
    assert _ingest(lake, source)["failed"] == 1
    assert _records(lake)["ok/1"][0] == "wrong_sha256"
    assert _ingest(lake, source)["asked"] == 0
    corrected = _list(tmp_path / "list.jsonl", {"url": web.url("ok/1"), "sha256": hashlib.sha256(picture(1)).hexdigest()})
    assert _ingest(lake, corrected)["asked"] == 1 and _records(lake)["ok/1"][0] is None


def test_a_forgotten_url_is_not_asked_again_whatever_the_settings_say(lake: Lake, tmp_path: Path, web: Web) -> None:
    source = _list(tmp_path / "list.jsonl", {"url": web.url("ok/1")})
    _ingest(lake, source)
    lake.write(lambda connection: connection.execute("UPDATE op_download SET error = 'forgotten', permanent = true") and None)
    assert _ingest(lake, source, opt_out=[], retry_permanent=True)["asked"] == 0
    assert dict(web.asked) == {"ok/1": 1}


@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "jsonl", "json", "parquet"])
def test_every_kind_of_list_is_read(tmp_path: Path, suffix: str) -> None:
    lines = [{"url": f"https://example.org/{n}", "caption": f"words, {n}"} for n in range(3)]
    path = tmp_path / f"list.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(lines), path)
    elif suffix == "txt":
        path.write_text("# a comment\n" + "".join(f"{line['url']}\n\n" for line in lines))
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif suffix == "json":
        path.write_text(json.dumps(lines))
    else:
        mark = "," if suffix == "csv" else "\t"
        path.write_text(f"url{mark}caption\n" + "".join(f'{line["url"]}{mark}"{line["caption"]}"\n' for line in lines))
    source = sources.extra_source(ExtraSource(name="web", kind="url_list", path=path))
    units = list(source.units(DigestCache(tmp_path / "cache.json")))
    assert [unit.reading.url for unit in units] == [line["url"] for line in lines]
    assert [unit.reading.caption for unit in units] == ([None] * 3 if suffix == "txt" else [line["caption"] for line in lines])


def test_a_list_without_urls_is_refused(lake: Lake, tmp_path: Path) -> None:
    with pytest.raises(MappingError, match="has no column 'url': its columns are 'link', 'caption'"):
        _ingest(lake, _list(tmp_path / "list.jsonl", {"link": "x", "caption": "y"}))


def test_the_same_url_twice_is_fetched_once_and_keeps_both_captions(lake: Lake, tmp_path: Path, web: Web) -> None:
    source = _list(tmp_path / "list.jsonl", *({"url": web.url("ok/1"), "caption": words} for words in ("one", "two")))
    counts = _ingest(lake, source)
    assert (counts["asked"], counts["records"], lake.count("images")) == (1, 2, 1)
    assert {row["text"] for row in rows(lake, "SELECT text FROM captions")} == {"one", "two"}


def test_edit_sets_whose_sources_are_urls_are_downloaded_for_their_mapping(lake: Lake, tmp_path: Path, web: Web) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "out.png").write_bytes(picture(2))
    line = {"text": "do it", "output_image": "out.png", "edit_type": "t"}
    paths = ("ok/1", "404/a")
    (tmp_path / "set" / "sft.jsonl").write_text("".join(json.dumps({**line, "open_image_input_url": web.url(path)}) + "\n" for path in paths))
    counts = _ingest(lake, {"name": "pico", "kind": "jsonl", "path": tmp_path / "set" / "sft.jsonl", "mapping": "pico_banana"})
    assert (counts["asked"], counts["records"], counts["failed"], lake.count("edits")) == (2, 2, 1, 1)
    assert [row["error"] for row in rows(lake, "SELECT error FROM op_ingest ORDER BY source_key")] == [None, "http_404"]


DRIVER = """
import json, sys
from dreamlite_data import downloads, refresh
from dreamlite_data.lake import Lake
from dreamlite_data.settings import RefreshSettings
downloads.COMMIT_S = 0.05
settings = RefreshSettings.model_validate_json(sys.argv[2])
lake = Lake(sys.argv[1])
print("ready", flush=True)
refresh.ingest(lake, settings, refresh.from_settings(settings))
"""


@pytest.mark.slow
def test_a_kill_costs_no_stored_file_and_the_next_run_goes_on(empty_lake: Path, tmp_path: Path, web: Web) -> None:
    import shutil

    from tests.dreamlite_data.sources.tables import settings_of

    shutil.copytree(empty_lake, tmp_path / "lake")
    source = _list(tmp_path / "list.jsonl", *({"url": web.url(f"ok/{n}")} for n in range(40)))
    settings = settings_of(source, downloads={**POLITE, "host_interval_s": 0.1, "connections_per_host": 1}, workers=1)
    process = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path / "lake"), settings.model_dump_json()], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while sum(web.asked.values()) < 12 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with Lake(tmp_path / "lake") as lake:
        remembered = lake.count("op_download")
        assert 0 < remembered < 40
        counts = _ingest(lake, source)
        assert (counts["asked"], counts["records"], counts["failed"]) == (40 - remembered, 40, 0)
        stored = [file.name for file in downloads.folder(lake).rglob("*") if file.is_file()]
        assert sorted(stored) == sorted(hashlib.sha256(picture(n)).hexdigest() for n in range(40))
