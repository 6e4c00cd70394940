"""Small-world parts are kept in the package in half precision and worked with in single precision.
Half of the bytes carry all that the parts know: what they reach is measured after the rounding."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def store_half(folder: Path) -> None:
    """Round every float32 weight below `folder` to float16, in place."""
    _rewrite(folder, torch.float32, torch.float16)


def unpack(source: Path, target: Path) -> Path:
    """Copy `source` to `target` with every float16 weight as float32: what stock pipelines then load has one precision."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    _rewrite(target, torch.float16, torch.float32)
    return target


def _rewrite(folder: Path, before: torch.dtype, after: torch.dtype) -> None:
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as opened:
            metadata, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}
        if any(value.dtype == before for value in tensors.values()):
            rewritten = path.with_suffix(".partial")
            save_file({key: value.to(after) if value.dtype == before else value for key, value in tensors.items()}, rewritten, metadata)
            rewritten.replace(path)
