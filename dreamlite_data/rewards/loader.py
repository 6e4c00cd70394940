"""From a checkpoint directory to a network: finds the weights, maps both published key layouts, checks every key.
Streams safetensors into a skeleton without memory, so a 7 B model is never held twice."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

REPLACED_PREFIXES = (
    ("model.visual.", "backbone.visual."),
    ("model.language_model.", "backbone.language_model."),
    ("visual.", "backbone.visual."),
    ("model.", "backbone.language_model."),
)
"""Nested layout (EditReward, transformers >= 4.52) first, then the flat one (HPSv3, transformers 4.45)."""

EMBEDDING_KEYS = ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight")
DROPPED_KEY = "lm_head.weight"  # dead weight: the score never reads a vocabulary logit


class RewardCheckpointError(ValueError):
    """A reward checkpoint that cannot be used; the message says what is wrong, where, and how to mend it."""


def network_key(key: str) -> str | None:
    """The name in our network of a published state-dict key; None for keys that are dropped."""
    if key == DROPPED_KEY:
        return None
    single = re.fullmatch(r"rm_head\.(\d+\.\w+)", key)
    if single:
        return f"heads.0.{single[1]}"
    several = re.fullmatch(r"rm_heads\.head_(\d+)\.(\d+\.\w+)", key)
    if several:
        return f"heads.{several[1]}.{several[2]}"
    for old, new in REPLACED_PREFIXES:
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def released_key(key: str, *, kind: str) -> str:
    """The inverse of `network_key`: flat layout for `hpsv3`, nested layout for `editreward`."""
    flat = kind == "hpsv3"
    if key.startswith("heads."):
        _, head, rest = key.split(".", 2)
        return f"rm_head.{rest}" if flat else f"rm_heads.head_{head}.{rest}"
    key = key.removeprefix("backbone.")
    if flat:
        return "model." + key.removeprefix("language_model.") if key.startswith("language_model.") else key
    return f"model.{key}"


def weight_files(model_dir: Path) -> list[Path]:
    """The files that hold the weights: a sharded index, one .safetensors or one .pth file."""
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise RewardCheckpointError(f"{model_dir} is not a directory; give the folder that holds the reward checkpoint")
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise RewardCheckpointError(f"{index}: shard names must be plain file names, not {outside[0]!r}")
        return [model_dir / name for name in names]
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


def _pth_state(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(state.get("model"), dict):
        state = state["model"]
    return state


def stored_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Every stored key with its shape, read without loading a weight."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        if path.suffix == ".pth":
            shapes |= {key: tuple(value.shape) for key, value in _pth_state(path).items()}
            continue
        with safe_open(path, "pt") as opened:
            shapes |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
    return shapes


def stored_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor, one at a time."""
    for path in files:
        if path.suffix == ".pth":
            yield from _pth_state(path).items()
            continue
        with safe_open(path, "pt") as opened:
            for key in opened.keys():
                yield key, opened.get_tensor(key)


def vocabulary_rows(shapes: dict[str, tuple[int, ...]], where: Path) -> int:
    """Rows of the stored embedding. Training shrank the vocabulary to the tokenizer, so the config is not to be
    believed (152,064 rows there, 151,658 in HPSv3)."""
    for key in EMBEDDING_KEYS:
        if key in shapes:
            return shapes[key][0]
    raise RewardCheckpointError(f"{where}: no token embedding among the weights (looked for {', '.join(EMBEDDING_KEYS)})")


def head_widths(shapes: dict[str, tuple[int, ...]]) -> list[list[int]]:
    """Widths of each head's linear layers as stored, e.g. [[3584, 1024, 16, 2]]."""
    heads: dict[int, dict[int, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        found = re.fullmatch(r"heads\.(\d+)\.(\d+)\.weight", network_key(key) or "")
        if found:
            heads.setdefault(int(found[1]), {})[int(found[2])] = shape
    return [
        [layers[min(layers)][1], *(layers[index][0] for index in sorted(layers))] for _, layers in sorted(heads.items())
    ]


def load_weights(network: nn.Module, files: list[Path], *, device: str | torch.device, dtype: torch.dtype) -> None:
    """Fill `network` (on the meta device) from `files`; backbone in `dtype`, heads in float32.

    Raises RewardCheckpointError that lists every missing, unexpected and misshapen key.
    """
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    unexpected, misshapen, seen = [], [], set()
    for key, tensor in stored_tensors(files):
        name = network_key(key)
        if name is None:
            continue
        if name not in expected:
            unexpected.append(key)
            continue
        if tuple(tensor.shape) != expected[name]:
            misshapen.append(f"{key} {tuple(tensor.shape)} instead of {expected[name]}")
            continue
        seen.add(name)
        target = torch.float32 if name.startswith("heads.") else dtype
        module, attribute = network.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        setattr(module, attribute, nn.Parameter(tensor.to(device=device, dtype=target), requires_grad=False))
    missing = sorted(set(expected) - seen - {network_key(text.split(" ")[0]) for text in misshapen})
    if missing or unexpected or misshapen:
        problems = [
            f"{len(keys)} {word}: {', '.join(keys)}"
            for word, keys in (("missing", missing), ("unexpected", sorted(unexpected)), ("misshapen", misshapen))
            if keys
        ]
        raise RewardCheckpointError(
            f"{files[0].parent}: the weights do not fit config.json ({'; '.join(problems)}); "
            "use the config.json of the base model that this checkpoint was trained from"
        )
