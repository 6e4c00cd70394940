"""Weights of further scorers, read safely and fitted strictly: every missing, unexpected and misshapen key is named.
Pickled files are read with `weights_only`, so a checkpoint can hold nothing but tensors."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dreamlite_data.rewards.stored import RewardCheckpointError, misfits

WRAPPERS = ("state_dict", "model")
"""Names under which training scripts put the tensors: open_clip's and HPSv2's, and BLIP's."""


def find_file(folder: Path, patterns: tuple[str, ...], what: str) -> Path:
    """The one file of `folder` that matches the first pattern which any file matches. Raises RewardCheckpointError."""
    if not Path(folder).is_dir():
        raise RewardCheckpointError(f"{folder} is not a directory; give the folder that holds {what}")
    for pattern in patterns:
        found = sorted(Path(folder).glob(pattern))
        if len(found) > 1:
            raise RewardCheckpointError(
                f"{folder} holds several files that could be {what}: {', '.join(path.name for path in found)}; leave one"
            )
        if found:
            return found[0]
    raise RewardCheckpointError(f"{folder} holds no {' and no '.join(patterns)}: put {what} there")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt or .pth file by their stored names. Raises RewardCheckpointError."""
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise RewardCheckpointError(f"{path} is no file of tensors only, and nothing else is read ({reason}); download it again") from error
    for name in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise RewardCheckpointError(f"{path} holds no state dict of tensors; give the released checkpoint")
    return {key.removeprefix("module."): value for key, value in state.items()}


def fill(network: nn.Module, state: Mapping[str, Tensor], where: Path, *, dtype: torch.dtype, heads: tuple[str, ...] = ()) -> None:
    """Fill `network`, built on the meta device, with `state` in `dtype`; parts named in `heads` stay float32.

    Raises RewardCheckpointError that lists every missing, unexpected and misshapen key.
    """
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {expected[key]}"
        for key in sorted(expected.keys() & state.keys()) if tuple(state[key].shape) != expected[key]
    ]  # fmt: skip
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if listed := misfits({"missing": missing, "unexpected": unexpected, "misshapen": misshapen}):
        raise RewardCheckpointError(f"{where}: the weights do not fit the configuration ({listed})")
    filled = {key: value.to(torch.float32 if key.startswith(heads) else dtype) for key, value in state.items()}
    network.load_state_dict(filled, assign=True)
    for name, buffer in network.named_buffers():
        if buffer.is_meta:  # positions 0, 1, 2, ...: no weight, so no file has them
            owner = network.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], torch.arange(buffer.shape[-1]).expand(buffer.shape))
    network.requires_grad_(False).eval()
