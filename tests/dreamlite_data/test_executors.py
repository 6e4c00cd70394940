"""Both executors give results in task order, and a dead worker is one clear error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dreamlite_data import executors


def late_if_first(number: int) -> int:
    time.sleep(0.3 if number == 0 else 0.0)
    return number * number


def fails_at_three(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    return number


def dies(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(params=["inline", "processes", pytest.param("ray", marks=pytest.mark.slow)], scope="module")
def executor(request: pytest.FixtureRequest):
    made = {"inline": lambda: executors.local(1), "processes": lambda: executors.local(2), "ray": lambda: executors.ray(2)}[request.param]()
    yield made
    made.close()


def test_results_come_in_task_order(executor: executors.Executor) -> None:
    assert list(executor.map(late_if_first, list(range(9)))) == [n * n for n in range(9)]
    assert list(executor.map(late_if_first, [])) == []


def test_an_error_of_the_function_comes_through_as_itself(executor: executors.Executor) -> None:
    with pytest.raises(ValueError, match="three"):
        list(executor.map(fails_at_three, list(range(6))))
    assert list(executor.map(fails_at_three, [1, 2])) == [1, 2]


def test_a_dead_worker_is_reported_and_the_next_call_works() -> None:
    with executors.local(2) as pool:
        with pytest.raises(executors.ExecutorError, match="worker process died.*run again"):
            list(pool.map(dies, [1, 2, 3]))
        assert list(pool.map(late_if_first, [2, 3])) == [4, 9]


FAILS_OFTEN = """
from dreamlite_data import executors
from tests.dreamlite_data.test_executors import fails_at_three

with executors.ray(2) as executor:
    for _ in range(150):
        try:
            list(executor.map(fails_at_three, range(6)))
        except ValueError:
            continue
        raise AssertionError("three is an error")
print("alive")
"""


@pytest.mark.slow
def test_errors_while_tasks_are_in_flight_do_not_end_the_driver() -> None:
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", FAILS_OFTEN], capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": root})
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr[-2000:]


def says_its_name_and_waits(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(120)


def test_workers_of_a_killed_process_end_with_it(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[2])
    work = f"list(local(2).map(says_its_name_and_waits, [{str(tmp_path)!r}] * 6))"
    code = f"from dreamlite_data.executors import local\nfrom tests.dreamlite_data.test_executors import *\nif __name__ == '__main__':\n    {work}"
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": root})
    _wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    workers = [psutil.Process(int(path.name)) for path in tmp_path.iterdir()]
    assert not any(map(_ended, workers))
    driver.kill()
    driver.wait()
    _wait_until(lambda: all(map(_ended, workers)))


def _ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _wait_until(true: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_no_task_starts_no_worker() -> None:
    for idle in (executors.local(4), executors.ray(4)):
        assert list(idle.map(late_if_first, [])) == [] and idle.started == 0
        idle.close()


def test_a_cluster_that_does_not_answer_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    ray.shutdown()  # what earlier tests started would be used as it is
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    executor = executors.ray(2)
    with pytest.raises(executors.ExecutorError, match="no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1"):
        list(executor.map(late_if_first, [1]))
    assert executor.started == 0


def test_tasks_are_taken_as_they_are_needed(executor: executors.Executor) -> None:
    taken = []

    def endless():
        for number in range(1_000_000):
            taken.append(number)
            yield number

    results = executor.map(late_if_first, endless())
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    results.close()
    assert len(taken) < 20
