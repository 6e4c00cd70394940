"""The device of this process: the GPU of its local rank, or the CPU. Whoever starts a computation asks here, once, and hands it on.
No part of a step's key: a device decides how fast a result comes and how its sums round, never what is asked for."""

from __future__ import annotations

import os

import torch

from trainers.execution import Device

CPU = torch.device("cpu")


def use_device(wanted: Device = "auto") -> torch.device:
    """The device to compute on; a GPU becomes torch's current one, which NCCL and FSDP2 take without being told.

    Of the GPUs that torch sees a process drives number LOCAL_RANK, which torchrun and Ray Train set; without them the first.
    Raises RuntimeError where `cuda` is wanted and torch sees none, or where this process would have to share one.
    """
    seen = 0 if wanted == "cpu" else torch.cuda.device_count()
    if not seen:
        if wanted == "cuda":
            built = "" if torch.version.cuda else f" (torch {torch.__version__} is built without CUDA)"
            raise RuntimeError(f"exec.device is cuda, but torch sees no GPU here{built}: set exec.device to auto or cpu, or install what the GPU needs")
        return CPU
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= seen:
        raise RuntimeError(
            f"process {number + 1} of this machine finds no GPU of its own, torch sees {seen}: lower exec.train.workers to {seen} or set exec.device to cpu"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # by default convolutions keep 10 bits of a float32: `precision` says what is asked for
    return device
