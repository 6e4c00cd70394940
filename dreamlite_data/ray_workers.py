"""What runs on Ray's workers: a function by its name, in a task that sees no GPU, or in a pool of actors that each hold their own.
An actor lives as long as a map, so that the model it loaded serves every task it is given."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

RETRIES = 3
"""Of a task whose worker was lost."""
IN_FLIGHT = 2
"""Tasks that an actor has at once: one to work at, and one that waits beside it."""
HELD_BACK = 4
"""Tasks per actor that may be taken and not yet handed on: a slow one at the head must not stop the others, nor fill the memory."""
GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
RESOURCES = {"num_cpus": "CPU", "num_gpus": "GPU"}

Name = tuple[tuple[str, str], ...]
"""(module, qualified name) of a function, or of several of which each takes what the one before gave."""


def name_of(function: Callable[[Any], Any]) -> Name:
    """Where workers find a function, or the functions that a `partial` chains to one."""
    parts = function.args if isinstance(function, functools.partial) else (function,)
    return tuple((part.__module__, part.__qualname__) for part in parts)


def call(name: Name, task: Any) -> Any:
    """`task` given to the function of that name: its module, and models cached in it, is imported once per worker."""
    for module, qualified_name in name:
        target: Any = importlib.import_module(module)
        for part in qualified_name.split("."):
            target = getattr(target, part)
        task = target(task)
    return task


def call_without_gpu(name: Name, task: Any) -> Any:
    """The same in a worker that was given no GPU. Ray 2.60 leaves it all of them to see, so that a model in it would take the first
    one, which an actor holds."""
    for variable in GPU_VARIABLES:
        os.environ[variable] = ""
    return call(name, task)


class GpuActor:
    """A process with GPUs of its own: Ray names them in CUDA_VISIBLE_DEVICES, so that the first that it sees is the one it was given."""

    def ready(self) -> None:
        """Answers once the actor has been placed."""

    def call(self, name: Name, task: Any) -> Any:
        """As `call`."""
        return call(name, task)


def room(nodes: Iterable[Mapping[str, Any]], wanted: Mapping[str, float]) -> int:
    """How many workers that each want num_cpus and num_gpus fit onto the living nodes (of `ray.nodes()`) at once. One worker lies on one
    node: two nodes with a GPU each have no room for a worker of two."""
    fits = 0
    for node in nodes:
        if node["Alive"]:
            have = [(node["Resources"].get(RESOURCES[key], 0.0), number) for key, number in wanted.items() if key in RESOURCES and number > 0]
            fits += min((math.floor(offered / number + 1e-6) for offered, number in have), default=0)
    return fits


def map_on_actors(
    ray: Any, count: int, wanted: Mapping[str, float], name: Name, tasks: Iterable[Any], get: Callable[[Any], Any]
) -> Iterator[Any]:
    """Results of the function for each task, in their order, from at most `count` actors that each hold `wanted`. A task goes to the actor
    that has least to do of those that are placed: on a shared cluster some may still wait for a GPU. `get` fetches a result and raises
    what went wrong. The actors end with the last result, and their GPUs are free for the next operator."""
    waiting = iter(tasks)
    first = list(itertools.islice(waiting, count))
    if not first:
        return
    waiting = itertools.chain(first, waiting)
    remote = ray.remote(max_restarts=RETRIES, max_task_retries=RETRIES, **wanted)(GpuActor)
    actors = [remote.remote() for _ in first]
    running: dict[Any, tuple[int | None, int]] = {actor.ready.remote(): (None, number) for number, actor in enumerate(actors)}
    load: dict[int, int] = {}
    finished: dict[int, Any] = {}
    taken = given = 0
    more = True
    try:
        while True:
            while more and taken - given < HELD_BACK * len(actors) and load and (least := min((n, number) for number, n in load.items()))[0] < IN_FLIGHT:
                for task in itertools.islice(waiting, 1):
                    running[actors[least[1]].call.remote(name, task)] = (taken, least[1])
                    load[least[1]] += 1
                    taken += 1
                    break
                else:
                    more = False
            if given in finished:
                yield get(finished.pop(given))
                given += 1
                continue
            if not more and given == taken:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            place, number = running.pop(done[0])
            if place is None:
                get(done[0])
                load[number] = 0
            else:
                load[number] -= 1
                finished[place] = done[0]
    finally:
        for actor in actors:
            ray.kill(actor)
