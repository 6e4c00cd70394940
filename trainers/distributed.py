"""Processes that train one model together: which rows of a global batch are this one's, and sums over all of them.
torchrun or Ray Train starts them; in a process alone nothing here communicates and nothing changes a bit."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from trainers.device import CPU

Value = TypeVar("Value")

BUCKET_BYTES = 32 * 2**20
"""Gradients are summed in flat pieces of about this size: a call for each of 700 small tensors would cost more than the bytes."""
PATIENCE_S = 6 * 3600.0
"""How long a process waits for the others: the first one may be encoding a whole dataset. A lost process is noticed by the
launcher, which ends the rest, not by this limit."""


@dataclasses.dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes: log, checkpoints, progress."""
        return self.rank == 0


def world() -> World:
    """Who this process is; a world of one where no process group has been joined."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


@contextmanager
def joined(device: torch.device = CPU) -> Iterator[World]:
    """Join the processes that torchrun started (RANK and WORLD_SIZE in the environment), and leave them at the end. What they
    sum lies on `device`.

    Where a group is there already (Ray Train made it) or nothing was launched, the world is taken as it is. All processes but
    the first show no progress.
    """
    ours = not dist.is_initialized() and "WORLD_SIZE" in os.environ
    if ours:
        _join(backend(device.type), datetime.timedelta(seconds=PATIENCE_S))
    here = world()
    if not here.first:
        os.environ["DREAMLITE_PROGRESS"] = "0"
    try:
        yield here
    finally:
        if ours:
            dist.destroy_process_group()


def _join(backend_name: str, timeout: datetime.timedelta) -> None:
    """Join the group with names of this try alone: torchrun's store outlives a try and keeps the addresses of lost processes, and those
    that replaced them would wait for them for ever (torch 2.13, see pytorch/pytorch#135712)."""
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"try_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend_name, store=store, rank=rank, world_size=size, timeout=timeout)


def backend(device_type: str) -> str:
    """What sums tensors on devices of a type: NCCL on GPUs, with Gloo for what stays on the CPU there; else Gloo alone."""
    return "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"


def own_share(rows: int) -> int:
    """Rows of a global batch that each process takes, in the order of ranks (the last one may take fewer).

    Raises ValueError where a process would be left without a row.
    """
    here = world()
    share = -(-rows // here.size)
    if share * (here.size - 1) >= rows:
        raise ValueError(f"a batch of {rows} rows leaves some of {here.size} processes without one: start fewer or raise `batch`")
    return share


def sum_over_processes(tensors: Sequence[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place; every process must name the same tensors."""
    if world().size > 1:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            _scatter(flat, bucket)


def copy_from_first(tensors: Sequence[torch.Tensor]) -> None:
    """Overwrite each tensor by that of the first process, in place."""
    if world().size > 1:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.broadcast(flat, src=0)
            _scatter(flat, bucket)


def gathered(value: Value) -> list[Value]:
    """The small values of all processes, by rank."""
    here = world()
    if here.size == 1:
        return [value]
    values: list[Value] = [value] * here.size
    dist.all_gather_object(values, value)
    return values


def as_the_first_says(value: Value) -> Value:
    """The first process's value, for decisions that all must share."""
    if world().size == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def wait_for_all() -> None:
    """Return once every process has come here."""
    if world().size > 1:
        gathered(None)


@contextmanager
def first_process_first() -> Iterator[None]:
    """Run the block in the first process, then in the others: what it leaves on the shared disk they find there.

    Where it fails in the first process, the others are told and fail too, instead of waiting.
    """
    here = world()
    failure: str | None = None
    if not here.first and (failure := as_the_first_says(None)):
        raise RuntimeError(f"the first process failed: {failure}")
    try:
        yield
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"
        raise
    finally:
        if here.first:
            as_the_first_says(failure)


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors of one type and device together, up to BUCKET_BYTES each; the same cut in every process."""
    bucket: list[torch.Tensor] = []
    held = 0
    for tensor in tensors:
        fits = bucket and tensor.dtype == bucket[0].dtype and tensor.device == bucket[0].device and held < BUCKET_BYTES
        if bucket and not fits:
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.numel() * tensor.element_size()
    if bucket:
        yield bucket


@torch.no_grad()
def _scatter(flat: torch.Tensor, bucket: Sequence[torch.Tensor]) -> None:
    parts = flat.split([tensor.numel() for tensor in bucket])
    for tensor, part in zip(bucket, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
