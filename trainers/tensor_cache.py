"""Tensors that are costly to make, kept on disk by name: append-only parts, each renamed into place when complete.
The folder's name holds the versions of what made them, so that other parts never answer for these."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dreamlite_data.progress import Progress
from trainers.parallel import map_threads

ENCODE_ROWS = 32
PART_ROWS = 2_048  # rows a part holds: what a kill -9 can lose


class TensorCache:
    """Named tensors, held in memory and on disk. Raises ValueError with the file's name where a part of it cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values: dict[str, torch.Tensor] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("part-*.safetensors")):
            try:
                with safe_open(path, framework="pt") as part:
                    keys = json.loads(part.metadata()["keys"])
                    flat, lengths = part.get_tensor("flat"), part.get_tensor("lengths").tolist()
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"the cache part {path} is damaged ({error}): delete that file, its rows will be encoded again") from None
            self.values.update(zip(keys, flat.split(lengths), strict=True))

    def fill(self, keys: Sequence[str], encode: Callable[[list[int]], list[torch.Tensor]], label: str) -> None:
        """Encode the keys that are missing; `encode` gets indices into `keys` and returns tensors [N_i, ...]."""
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        missing = sorted(index for key, index in first.items() if key not in self.values)
        if not missing:
            return
        with Progress(label, total=len(missing), unit="rows") as bar:
            for start in range(0, len(missing), PART_ROWS):
                part = missing[start : start + PART_ROWS]
                tensors: list[torch.Tensor] = []
                for encoded in map_threads(encode, [part[at : at + ENCODE_ROWS] for at in range(0, len(part), ENCODE_ROWS)]):
                    tensors += [tensor.to(torch.float16) for tensor in encoded]
                    bar.advance(len(encoded))
                self._write([keys[index] for index in part], tensors)

    def get(self, keys: Sequence[str]) -> list[torch.Tensor]:
        """The tensors of `keys`, float32."""
        return [self.values[key].float() for key in keys]

    def _write(self, keys: list[str], tensors: list[torch.Tensor]) -> None:
        lengths = torch.tensor([len(tensor) for tensor in tensors])
        name = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
        partial = self.folder / f".{name}.{os.getpid()}.partial"
        save_file({"flat": torch.cat(tensors).contiguous(), "lengths": lengths}, partial, {"keys": json.dumps(keys)})
        partial.rename(self.folder / f"part-{name}.safetensors")
        self.values.update(zip(keys, tensors, strict=True))
