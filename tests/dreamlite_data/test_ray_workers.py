"""GPU work on Ray as scheduling: two pretended GPUs, one actor each, CPU work that sees neither, and results in the order of the tasks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dreamlite_data import executors
from dreamlite_data.model_settings import CaptionBackend, EmbedSettings
from dreamlite_data.ray_workers import room
from dreamlite_data.settings import RefreshSettings

GPU = {"num_cpus": 1.0, "num_gpus": 1.0}


def where(number: int) -> tuple[int, int, str | None]:
    """Task, process, and the GPUs that it sees."""
    time.sleep(0.3 if number == 0 else 0.05)
    return number, os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")


def where_together(task: tuple[int, str, int]) -> tuple[int, int, str | None]:
    """As `where`, once `together` processes are at work at the same time: however slowly they start, each has its turn."""
    number, folder, together = task
    (Path(folder) / str(os.getpid())).touch()
    deadline = time.monotonic() + 120
    while len(os.listdir(folder)) < together and time.monotonic() < deadline:
        time.sleep(0.05)
    return number, os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")


def fails_at_three(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    return number


def dies_once(folder: str) -> str:
    marker = Path(folder) / "died"
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "lived"


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[executors.RayExecutor]:
    ray = pytest.importorskip("ray")
    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:  # workers find this module where the tests found it
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_worker_niceness", "0")
        for attempt in range(executors.RAY_STARTS):  # on a loaded machine a start may time out
            try:
                ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
                         object_store_memory=100 * 2**20)  # fmt: skip
                break
            except Exception:
                ray.shutdown()
                if attempt == executors.RAY_STARTS - 1:
                    raise
        yield executors.ray(4)
        ray.shutdown()


@pytest.mark.slow
def test_each_actor_has_its_own_gpu_and_serves_many_tasks(two_gpus: executors.RayExecutor, tmp_path: Path) -> None:
    found = list(two_gpus.map(where_together, [(number, str(tmp_path), 2) for number in range(12)], GPU))
    assert [number for number, _, _ in found] == list(range(12))
    by_process = {process: {gpu for _, other, gpu in found if other == process} for _, process, _ in found}
    assert sorted(by_process.values(), key=str) == [{"0"}, {"1"}]


@pytest.mark.slow
def test_work_without_gpu_sees_none_before_and_after(two_gpus: executors.RayExecutor, tmp_path: Path) -> None:
    actors: set[int] = set()
    for _ in range(2):
        on_cpu = list(two_gpus.map(where, list(range(4))))
        assert {gpu for _, _, gpu in on_cpu} == {""}
        together = tmp_path / str(len(actors))
        together.mkdir()
        on_gpu = list(two_gpus.map(where_together, [(number, str(together), 2) for number in range(4)], GPU))
        assert {gpu for _, _, gpu in on_gpu} == {"0", "1"}  # free again after the round before
        assert not {process for _, process, _ in on_cpu} & {process for _, process, _ in on_gpu} and not actors & {p for _, p, _ in on_gpu}
        actors |= {process for _, process, _ in on_gpu}


@pytest.mark.slow
def test_parts_of_a_gpu_are_shared_and_whole_ones_are_not(two_gpus: executors.RayExecutor, tmp_path: Path) -> None:
    tasks = [(number, str(tmp_path), 4) for number in range(12)]
    halves = list(two_gpus.map(where_together, tasks, {"num_cpus": 1.0, "num_gpus": 0.5}))
    assert len({process for _, process, _ in halves}) == 4 and {gpu for _, _, gpu in halves} == {"0", "1"}
    both = list(two_gpus.map(where, list(range(3)), {"num_cpus": 1.0, "num_gpus": 2.0}))
    assert len({process for _, process, _ in both}) == 1 and {gpu for _, _, gpu in both} == {"0,1"}
    with pytest.raises(executors.ExecutorError, match="offers 2 GPU, a task needs 3: add nodes or lower the request"):
        list(two_gpus.map(where, [1], {"num_gpus": 3.0}))


@pytest.mark.slow
def test_errors_lost_actors_and_early_ends_leave_the_gpus_free(two_gpus: executors.RayExecutor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="three"):
        list(two_gpus.map(fails_at_three, list(range(6)), GPU))
    assert list(two_gpus.map(dies_once, [str(tmp_path)], GPU)) == ["lived"]
    taken = []

    def endless() -> Iterator[int]:
        for number in range(1_000_000):
            taken.append(number)
            yield number

    results = two_gpus.map(where, endless(), GPU)
    assert [next(results)[0] for _ in range(3)] == [0, 1, 2]
    results.close()
    assert len(taken) < 20
    assert len(list(two_gpus.map(where, [1, 2], GPU))) == 2


def _node(cpus: float, gpus: float, alive: bool = True) -> dict:
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}


@pytest.mark.parametrize(("nodes", "wanted", "count"), [
    ([_node(8, 2), _node(8, 1)], GPU, 3),
    ([_node(1, 4)], GPU, 1),  # more GPUs than CPUs to feed them
    ([_node(8, 1), _node(8, 1)], {"num_cpus": 1.0, "num_gpus": 2.0}, 0),  # together enough, but no node has room
    ([_node(8, 1)], {"num_cpus": 1.0, "num_gpus": 0.1}, 8),
    ([_node(16, 1)], {"num_cpus": 1.0, "num_gpus": 0.1}, 10),  # and not 9, for a tenth is no binary number
    ([_node(8, 2, alive=False), {"Alive": True, "Resources": {"CPU": 8.0}}], GPU, 0),
])  # fmt: skip
def test_actors_are_as_many_as_have_room(nodes: list[dict], wanted: dict[str, float], count: int) -> None:
    assert room(nodes, wanted) == count


def test_local_work_on_a_gpu_stays_in_one_process() -> None:
    with executors.local(2) as pool:
        assert {process for _, process, _ in pool.map(where, [1, 2, 3], GPU)} == {os.getpid()} and pool.started == 0


def test_settings_of_gpus_that_cannot_be_meant_are_refused() -> None:
    for make in (lambda n: EmbedSettings(num_gpus=n), lambda n: CaptionBackend(num_gpus=n)):
        assert [make(n).num_gpus for n in (0, 0.5, 1, 2)] == [0, 0.5, 1, 2]
        with pytest.raises(ValueError, match="a part of one GPU"):
            make(1.5)
    models = {"editor": "e", "instructor": "i", "tries": 1}
    with pytest.raises(ValueError, match="sees no other: write 'cuda'"):
        RefreshSettings(executor="ray", edit_model={**models, "device": "cuda:1"})
    assert RefreshSettings(executor="local", edit_model={**models, "device": "cuda:1"}).edit_model.device == "cuda:1"
