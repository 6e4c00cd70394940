"""The weight files of a reward checkpoint: which they are, what their headers say, and their tensors one by one.
Never a pickle: `.safetensors` as it is, `.pth` only as plain tensors (`weights_only`)."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The names that a safetensors header gives to element types."""

INDEX_FILE = "model.safetensors.index.json"


class RewardCheckpointError(ValueError):
    """A reward checkpoint that cannot be used; the message says what is wrong, where, and how to mend it."""


def misfits(problems: Mapping[str, Sequence[str]]) -> str:
    """Keys that do not fit, by what is wrong with them, as part of a sentence; empty where there are none."""
    return "; ".join(f"{len(keys)} {word}: {', '.join(keys)}" for word, keys in problems.items() if keys)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """What a header says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """How many bytes they take in the file."""
        return self.elements * self.dtype.itemsize


def weight_files(model_dir: Path) -> list[Path]:
    """The files that hold the weights: a sharded index, one .safetensors or one .pth file."""
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise RewardCheckpointError(f"{model_dir} is not a directory; give the folder that holds the reward checkpoint")
    index = model_dir / INDEX_FILE
    if index.exists():
        return [model_dir / name for name in shards(index)]
    for pattern in ("*.safetensors", "*.pth"):
        found = sorted(model_dir.glob(pattern))
        if len(found) > 1:
            raise RewardCheckpointError(
                f"{model_dir} holds several weight files ({', '.join(path.name for path in found)}) and no index; "
                "leave only the reward checkpoint"
            )
        if found:
            return found
    raise RewardCheckpointError(f"{model_dir} holds no .safetensors and no .pth file; download the reward weights there")


def shards(index: Path) -> list[str]:
    """Names of the files that an index of shards lists, each a plain one that is there. Raises RewardCheckpointError."""
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise RewardCheckpointError(f"{index} is no index of shards ({type(error).__name__}: {error}); download it again") from error
    for name in names:
        if Path(name).name != name:
            raise RewardCheckpointError(f"{index}: shard names must be plain file names, not {name!r}")
        if not (index.parent / name).exists():
            raise RewardCheckpointError(f"{index} names the shard {name}, which is not there; download it too")
    return names


def read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    """Every stored key with its shape and type. Reads headers only: of a 17 GB file, some hundred kilobytes.

    Raises RewardCheckpointError on a damaged file and on one key in two files.
    """
    found: dict[str, StoredTensor] = {}
    for path in files:
        with _readable(path):
            header = _pth_header(path) if path.suffix == ".pth" else _safetensors_header(path)
        twice = sorted(found.keys() & header.keys())
        if twice:
            raise RewardCheckpointError(f"{path}: {twice[0]} is in another shard too; download the checkpoint again")
        found |= header
    return found


def stored_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor, one at a time."""
    for path in files:
        with _readable(path):
            if path.suffix == ".pth":
                yield from _pth_state(path).items()
                continue
            with safe_open(path, "pt") as opened:
                for key in opened.keys():
                    yield key, opened.get_tensor(key)


def _safetensors_header(path: Path) -> dict[str, StoredTensor]:
    with safe_open(path, "pt") as opened:
        slices = {key: opened.get_slice(key) for key in opened.keys()}
        return {key: StoredTensor(tuple(each.get_shape()), DTYPES[each.get_dtype()]) for key, each in slices.items()}


def _pth_header(path: Path) -> dict[str, StoredTensor]:
    return {key: StoredTensor(tuple(value.shape), value.dtype) for key, value in _pth_state(path).items()}


def _pth_state(path: Path) -> dict[str, Tensor]:
    """The state dict of a zip file of torch, mapped and not read: a tensor's pages load when it is used."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    others = [key for key, value in state.items() if not isinstance(value, Tensor)] if isinstance(state, dict) else [type(state).__name__]
    if others:
        raise RewardCheckpointError(
            f"{path}: {others[0]!r} is no tensor; a .pth file must hold a state dict, or one under the key 'model'"
        )
    return state


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Errors of the readers as one sentence that says how to mend the file."""
    try:
        yield
    except SafetensorError as error:
        raise RewardCheckpointError(f"{path} is no whole safetensors file ({error}); download it again") from error
    except pickle.UnpicklingError as error:
        raise RewardCheckpointError(
            f"{path} holds other things than tensors, which could run code when read, and is refused; "
            "save the state dict alone, best as .safetensors"
        ) from error
    except KeyError as error:
        raise RewardCheckpointError(f"{path} holds numbers of the type {error}, which no reward checkpoint has") from error
    except RuntimeError as error:
        raise RewardCheckpointError(
            f"{path} cannot be read as a zip file of torch ({str(error).splitlines()[0]}); "
            "save it again with torch.save of torch >= 1.6, best as .safetensors"
        ) from error
