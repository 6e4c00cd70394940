"""Run one function over many tasks: in this machine's processes, or on Ray. Results come back in the order of the tasks.
A task is a whole shard of work and names everything it needs, so both executors give equal results, byte for byte."""

from __future__ import annotations

import collections
import functools
import itertools
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

from dreamlite_data.ray_workers import RESOURCES, RETRIES, call_without_gpu, map_on_actors, name_of, room
from dreamlite_data.settings import RefreshSettings

RAY_STARTS = 3
RAY_OBJECT_STORE_MB = 200
CONNECT_TIMEOUT_S = 10.0


class ExecutorError(RuntimeError):
    """Work could not be run at all (not: a bad row, which is a result)."""


class Executor(Protocol):
    """`map` calls `function(task)` for each task and yields the results in task order. `function` must be importable
    (module level) and its results small: shards go to files, results are what was written where. Tasks are taken when
    they are needed, a few ahead of the work, so that an endless night does not lie in memory."""

    name: str
    started: int
    """How often workers were started: stays 0 while there is nothing to do."""

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any], resources: dict[str, float] | None = None) -> Iterator[Any]: ...

    def map_stages(
        self, first: Callable[[Any], Any], second: Callable[[Any], Any], tasks: Iterable[Any], resources: dict[str, float] | None = None
    ) -> Iterator[Any]:
        """Yield `second(first(task))` for each task in task order; `resources` are those of the second stage."""
        ...

    def close(self) -> None: ...


class LocalExecutor:
    """Runs in this process (`workers=1`) or in `workers` fresh processes (spawned: DuckDB and torch do not survive a fork). Work that
    needs a GPU runs in this process: several would each load the model onto the same one."""

    name = "local"

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self.started = 0
        self._pool: ProcessPoolExecutor | None = None

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any], resources: dict[str, float] | None = None) -> Iterator[Any]:
        waiting = iter(tasks)
        first = list(itertools.islice(waiting, 2))
        if not first:
            return
        if self.workers == 1 or (resources or {}).get("num_gpus") or (len(first) == 1 and self._pool is None):
            for task in itertools.chain(first, waiting):
                yield function(task)
            return
        if self._pool is None:
            self.started += 1
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_start_worker)
        waiting = itertools.chain(first, waiting)
        running: collections.deque[Future] = collections.deque(
            self._pool.submit(function, task) for task in itertools.islice(waiting, 2 * self.workers)
        )
        try:
            while running:
                result = running.popleft().result()
                for task in itertools.islice(waiting, 1):
                    running.append(self._pool.submit(function, task))
                yield result
        except BrokenProcessPool as error:
            self.close()
            raise ExecutorError(
                "a local worker process died (most often: out of memory). What was committed is safe; run again, with fewer workers "
                "or smaller ingest.rows_per_task"
            ) from error
        finally:
            for future in running:
                future.cancel()

    def map_stages(
        self, first: Callable[[Any], Any], second: Callable[[Any], Any], tasks: Iterable[Any], resources: dict[str, float] | None = None
    ) -> Iterator[Any]:
        return self.map(functools.partial(_chained, first, second), tasks, resources)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _start_worker() -> None:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # one worker per core: libraries must not add threads of their own
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker of a killed process would wait for its next task for ever, and write what the next run is writing."""
    multiprocessing.parent_process().join()
    os._exit(1)


class RayExecutor:
    """Runs tasks on Ray: the cluster at RAY_ADDRESS, else a private one of `num_workers` CPUs on this machine.
    Ray starts with the first task and never without one. Work that asks for GPUs runs on as many actors as have room, each with its
    own; other work sees none."""

    name = "ray"

    def __init__(self, num_workers: int = 2) -> None:
        self.num_workers = num_workers
        self.started = 0

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any], resources: dict[str, float] | None = None) -> Iterator[Any]:
        waiting = iter(tasks)
        first = list(itertools.islice(waiting, 1))
        if not first:
            return
        ray = self.start()
        wanted = {"num_cpus": 1.0, **(resources or {})}
        self._refuse_unfit(ray, wanted)
        waiting = itertools.chain(first, waiting)
        name = name_of(function)
        if wanted.get("num_gpus"):
            yield from map_on_actors(ray, room(ray.nodes(), wanted), wanted, name, waiting, functools.partial(self._get, ray))
            return
        remote = ray.remote(max_retries=RETRIES, **wanted)(call_without_gpu)
        in_flight = 2 * max(self.num_workers, int(ray.cluster_resources().get("CPU", 1)))
        running = collections.deque(remote.remote(name, task) for task in itertools.islice(waiting, in_flight))
        # After an error or an early end the tasks in flight run out by themselves. `ray.cancel` would end the whole driver where one of
        # them completes at that moment (Ray 2.60: "Tried to complete task that was not pending").
        while running:
            result = self._get(ray, running.popleft())
            for task in itertools.islice(waiting, 1):
                running.append(remote.remote(name, task))
            yield result

    def map_stages(
        self, first: Callable[[Any], Any], second: Callable[[Any], Any], tasks: Iterable[Any], resources: dict[str, float] | None = None
    ) -> Iterator[Any]:
        """With `num_gpus` in `resources`: `first` in tasks on CPUs, `second` in one actor per such share of the cluster's GPUs, and
        what the first gives goes from node to node, never through the driver. Without, both run as one task: a second process
        with the same libraries would cost memory and copies, and no device would wait less."""
        if not (resources or {}).get("num_gpus"):
            yield from self.map(functools.partial(_chained, first, second), tasks, resources)
            return
        waiting = iter(tasks)
        head = list(itertools.islice(waiting, 1))
        if not head:
            return
        ray = self.start()
        wanted = {**resources, "num_cpus": 0.0}  # its CPU work is to feed the GPU: the CPUs are the first stage's
        self._refuse_unfit(ray, {**wanted, "num_cpus": 1.0})
        prepare = ray.remote(max_retries=RETRIES, num_cpus=1.0)(call_without_gpu)
        prepared = (prepare.remote(name_of(first), task) for task in itertools.chain(head, waiting))  # an actor gets what a reference names
        yield from map_on_actors(ray, room(ray.nodes(), wanted), wanted, name_of(second), prepared, functools.partial(self._get, ray))

    @staticmethod
    def _get(ray: Any, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except ray.exceptions.RayError as error:
            raise ExecutorError(
                f"a Ray worker was lost for good after three retries ({type(error).__name__}). What was committed is safe; run again"
            ) from error

    @staticmethod
    def _refuse_unfit(ray: Any, wanted: dict[str, float]) -> None:
        have = ray.cluster_resources()
        for key, name in RESOURCES.items():
            if wanted.get(key, 0) > have.get(name, 0):
                raise ExecutorError(
                    f"the Ray cluster offers {have.get(name, 0):g} {name}, a task needs {wanted[key]:g}: add nodes or lower the request"
                )
        if not room(ray.nodes(), wanted):
            said = " and ".join(f"{wanted[key]:g} {name}" for key, name in RESOURCES.items() if wanted.get(key))
            raise ExecutorError(f"no single node of the Ray cluster offers {said}, which one task needs: add a larger node or lower the request")

    def start(self) -> Any:
        """Ray, connected: the cluster at RAY_ADDRESS, or one of this executor's own. Raises ExecutorError where neither answers."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Ray runs workers at nice 15 by default: beside anything else that computes they all but stand still.
        os.environ.setdefault("RAY_worker_niceness", "0")
        import ray

        if ray.is_initialized():
            return ray
        address = os.environ.get("RAY_ADDRESS")
        if address:
            _refuse_silent_cluster(address)
        self.started += 1
        options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
        if not address:
            # "local" by name: without it Ray joins whatever cluster was last started on this machine, even a dead one.
            options |= {"address": "local", "num_cpus": self.num_workers, "object_store_memory": RAY_OBJECT_STORE_MB * 2**20}
            # Workers must find this package wherever the driver found it.
            package_root = str(Path(__file__).resolve().parents[1])
            paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
            if package_root not in paths:
                os.environ["PYTHONPATH"] = os.pathsep.join([package_root, *filter(None, paths)])
        else:
            options = {"address": address, "log_to_driver": False}
        tries = 1 if address else RAY_STARTS  # a cluster that answers and refuses will refuse again
        for attempt in range(1, tries + 1):
            try:
                ray.init(**options)
                break
            except Exception as error:  # ray raises bare exceptions of many kinds when a start times out
                ray.shutdown()
                if attempt < tries:
                    time.sleep(2.0 * attempt)
                elif address:
                    raise ExecutorError(
                        f"the Ray cluster at RAY_ADDRESS={address} refused this process: {error}. Both must run the same Ray, and where "
                        "the cluster checks tokens, RAY_AUTH_MODE and the token must be set here as on its head"
                    ) from error
                else:
                    raise ExecutorError(
                        f"a local Ray did not start in {tries} tries: {error}. Use executor: local, or look at /tmp/ray/session_latest/logs"
                    ) from error
        return ray

    def close(self) -> None:
        """Shut down the private Ray; a cluster at RAY_ADDRESS is only disconnected."""
        if self.started:
            import ray

            if ray.is_initialized():
                ray.shutdown()

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse_silent_cluster(address: str) -> None:
    """Ray waits many minutes for a head that is not there; a plain connection tells in seconds."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", "local" and the like: Ray looks them up itself
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ExecutorError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): start its head, correct the address, or unset RAY_ADDRESS to "
            "use this machine"
        ) from None


def _chained(first: Callable[[Any], Any], second: Callable[[Any], Any], task: Any) -> Any:
    return second(first(task))


def local(workers: int = 1) -> LocalExecutor:
    """Work in this machine's processes; one worker means in this very process."""
    return LocalExecutor(workers)


def ray(num_workers: int = 2) -> RayExecutor:
    """Work on Ray."""
    return RayExecutor(num_workers)


def from_settings(settings: RefreshSettings) -> LocalExecutor | RayExecutor:
    """The executor that the settings ask for."""
    return ray(settings.workers) if settings.executor == "ray" else local(settings.workers)
