"""A refresh that is killed for real while models edit pays for no instruction, no picture and no judgement twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamlite_data import executors, refresh, scenes
from dreamlite_data.lake import Lake
from dreamlite_data.pictures import pictures_folder
from dreamlite_data.responses import responses_folder
from dreamlite_data.settings import RefreshSettings
from dreamlite_data.takedown import forget
from tests.dreamlite_data.conftest import contents
from tests.dreamlite_data.counting_server import CountingServer, completion, sha256_of_image
from tests.dreamlite_data.rewards.conftest import short
from tests.trainers.conftest import checkpoints, components  # noqa: F401  (fixtures)

PHOTOS, TRIES, MADE_BEFORE_KILL = 3, 2, 4
MADE = ["op_edit", "edits", "instructions", "images"]

REFRESH = """
import sys, time
from pathlib import Path
from dreamlite_data import executors, refresh
from dreamlite_data.lake import Lake
from dreamlite_data.operators.edit_model import PipelineEditor
from dreamlite_data.settings import RefreshSettings
import trainers.processor  # of the tiny checkpoint: diffusers imports nothing by itself
root, settings, journal, hold_after = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
def noted(name, call):
    def noting(self, *given):
        if name == "make" and journal.read_text().split().count("make") == hold_after:
            journal.with_suffix(".held").touch()
            time.sleep(600)
        answer = call(self, *given)
        with journal.open("a") as lines:
            lines.write(name + "\\n")
        return answer
    return noting
PipelineEditor._make, PipelineEditor._judge = noted("make", PipelineEditor._make), noted("judge", PipelineEditor._judge)
refresh.measure(Lake(root), RefreshSettings.model_validate_json(settings), executors.local(), ["edit"])
"""
"""The real refresh with a journal of the calls that its models really made. It stands still before the picture after `hold_after`."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "photos"
    folder.mkdir()
    for seed in range(PHOTOS):
        Image.fromarray(scenes.render(scenes.sample_scene(np.random.default_rng(seed)))).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short("editreward_tiny", tmp_path_factory.mktemp("reward"), ["how well does it follow: {text_prompt}", "how well: {text_prompt}"])


@pytest.fixture(scope="module")
def prepared(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake in which all is done that comes before the editing."""
    lake = Lake(tmp_path_factory.mktemp("prepared") / "lake")
    settings = settings_for(photos)
    refresh.write_sources(lake, settings, 0)
    refresh.ingest(lake, settings, executors.local())
    refresh.measure(lake, settings, executors.local(), ["quality"])
    # Routes edit the sample photos only; these stand in for them, for they are few and of the size that the tiny model knows.
    lake.write(lambda connection: connection.execute("UPDATE op_ingest SET domain = 'photos'"))
    lake.close()
    return lake.root


def settings_for(photos: Path, **edit_model: object) -> RefreshSettings:
    return RefreshSettings(
        scenes={"t2i_rows": 0, "edit_rows": 0}, photos={"enabled": False, "edits_per_image": 0},
        extra_sources=({"name": "own", "kind": "folder", "path": photos},), edit_model=edit_model,
    )  # fmt: skip


def propose(body: dict) -> tuple:
    """An instruction that depends on the picture."""
    return completion(f"recolour: make the shape with number {sha256_of_image(body)[:6]} blue")


def start(lake: Lake, settings: RefreshSettings, journal: Path, hold_after: int) -> subprocess.Popen:
    journal.touch()
    return subprocess.Popen([sys.executable, "-c", REFRESH, str(lake.root), settings.model_dump_json(), str(journal), str(hold_after)])


def wait_for(path: Path, process: subprocess.Popen, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"{path.name} never came (exit code {process.poll()})"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("cache_kept", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_a_killed_refresh_pays_for_no_edit_twice(
    checkpoints: dict[str, Path], photos: Path, reward: Path, prepared: Path, tmp_path: Path, cache_kept: bool  # noqa: F811
) -> None:
    lake, journal = Lake(shutil.copytree(prepared, tmp_path / "lake")), tmp_path / "journal.txt"
    with CountingServer(propose) as server:
        settings = settings_for(
            photos, instructor={"backend": "endpoint", "model": "vlm", "base_url": server.url}, editor=checkpoints["base"], reward=reward,
            tries=TRIES, inference_steps=2,
        )  # fmt: skip
        process = start(lake, settings, journal, MADE_BEFORE_KILL)
        wait_for(journal.with_suffix(".held"), process)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        # Two photos were edited and judged to the end; none of it was committed, for all are one task.
        assert Counter(journal.read_text().split()) == {"make": MADE_BEFORE_KILL, "judge": MADE_BEFORE_KILL}
        assert lake.count("op_edit") == 0 and server.answered == PHOTOS
        if not cache_kept:
            shutil.rmtree(lake.files / "cache")
        assert start(lake, settings, journal, -1).wait() == 0
        lost = 0 if cache_kept else MADE_BEFORE_KILL
        assert Counter(journal.read_text().split()) == {"make": PHOTOS * TRIES + lost, "judge": PHOTOS * TRIES + lost}
        assert server.answered == PHOTOS * (1 if cache_kept else 2)
        assert lake.count("edits") == PHOTOS * TRIES and lake.query("SELECT sum(edits) AS n FROM op_edit")["n"][0].as_py() == PHOTOS
        if cache_kept:  # nothing shows that it was ever killed
            calm = Lake(shutil.copytree(prepared, tmp_path / "calm"))
            refresh.measure(calm, settings, executors.local(), ["edit"])
            assert contents(calm, MADE) == contents(lake, MADE)
            calm.close()
            _forgotten_photos_leave_the_caches(lake)


def _forgotten_photos_leave_the_caches(lake: Lake) -> None:
    """What a takedown removes goes from the kept answers and pictures as well, also a picture that no row knows."""
    photo = lake.query("SELECT min(subject_id) AS id FROM op_edit")["id"][0].as_py()
    orphan = next(pictures_folder(lake.files).rglob(f"{photo}.*.png"))
    orphan.with_name(f"{photo}.{'0' * 64}.png").write_bytes(b"a picture of a run that never committed")
    folders = (pictures_folder(lake.files), responses_folder(lake.files))
    before = [sum(item.is_file() for item in folder.rglob("*")) for folder in folders]
    forget(lake, [photo], "asked to")
    after = [sum(item.is_file() for item in folder.rglob("*")) for folder in folders]
    assert [was - now for was, now in zip(before, after, strict=True)] == [TRIES + 1, 1 + TRIES]
    assert not [path for folder in folders for path in folder.rglob("*") if photo in path.name or (path.is_file() and photo.encode() in path.read_bytes())]
