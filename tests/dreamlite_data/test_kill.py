"""A refresh that is killed for real, again and again at random moments, ends with the rows of one that never was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dreamlite_data import refresh
from dreamlite_data.lake import Lake
from tests.dreamlite_data.conftest import build, contents, small_settings

KILLS = 5
REFRESH = """
import sys
from dreamlite_data import executors, refresh
from dreamlite_data.lake import Lake
from dreamlite_data.settings import RefreshSettings
settings = RefreshSettings.model_validate_json(sys.argv[2])
lake = Lake(sys.argv[1])
executor = executors.local(int(sys.argv[3]))
refresh.ingest(lake, settings, executor)
for names in (["quality"], ["edit", "caption"], ["verify"]):
    refresh.measure(lake, settings, executor, names)
refresh.curate(lake, settings, 0)
executor.close()
"""


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_kills_at_random_moments_change_nothing(built: Lake, tmp_path: Path, workers: int) -> None:
    settings = small_settings(ingest={"rows_per_task": 16})
    lake = Lake(tmp_path)
    refresh.write_sources(lake, settings, 0)
    draw = random.Random(workers)
    killed = 0
    for _ in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", REFRESH, str(tmp_path), settings.model_dump_json(), str(workers)], start_new_session=True
        )
        goal = lake.snapshot() + draw.randint(1, 6)
        deadline = time.monotonic() + 120
        while process.poll() is None and lake.snapshot() < goal and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.2))  # into the next decode, write or commit
        os.kill(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        try:  # workers of a killed driver go on for a moment, and must do no harm either
            time.sleep(draw.uniform(0, 0.2))
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert killed >= 3  # it was at work, not done
    build(lake, settings)
    assert contents(lake) == contents(built)
    assert lake.clean() == 0  # and nothing of the killed ones is left on disk
