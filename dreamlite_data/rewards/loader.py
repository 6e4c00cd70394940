"""From stored tensors to a network: maps both published key layouts, checks every key, fills the network.
Streams into a skeleton without memory, so a 7 B model is never held twice."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from dreamlite_data.rewards.four_bit import four_bit_weight, is_four_bit
from dreamlite_data.rewards.stored import RewardCheckpointError, StoredTensor, stored_tensors

REPLACED_PREFIXES = (
    ("model.visual.", "backbone.visual."),
    ("model.language_model.", "backbone.language_model."),
    ("visual.", "backbone.visual."),
    ("model.", "backbone.language_model."),
)
"""Nested layout (EditReward, transformers >= 4.52) first, then the flat one (HPSv3, transformers 4.45)."""

EMBEDDING_KEYS = ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight")
DROPPED_KEY = "lm_head.weight"  # dead weight: the score never reads a vocabulary logit


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


def vocabulary_rows(header: dict[str, StoredTensor], where: Path) -> int:
    """Rows of the stored embedding. Training shrank the vocabulary to the tokenizer, so the config is not to be
    believed (152,064 rows there, 151,658 in HPSv3)."""
    for key in EMBEDDING_KEYS:
        if key in header:
            return header[key].shape[0]
    raise RewardCheckpointError(f"{where}: no token embedding among the weights (looked for {', '.join(EMBEDDING_KEYS)})")


def head_widths(header: dict[str, StoredTensor]) -> list[list[int]]:
    """Widths of each head's linear layers as stored, e.g. [[3584, 1024, 16, 2]]."""
    heads: dict[int, dict[int, tuple[int, ...]]] = {}
    for key, stored in header.items():
        found = re.fullmatch(r"heads\.(\d+)\.(\d+)\.weight", network_key(key) or "")
        if found:
            heads.setdefault(int(found[1]), {})[int(found[2])] = stored.shape
    return [
        [layers[min(layers)][1], *(layers[index][0] for index in sorted(layers))] for _, layers in sorted(heads.items())
    ]


def key_problems(network: nn.Module, header: dict[str, StoredTensor]) -> dict[str, list[str]]:
    """What does not fit between a network and stored weights: lists of 'missing', 'unexpected' and 'misshapen' keys."""
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    problems: dict[str, list[str]] = {"missing": [], "unexpected": [], "misshapen": []}
    found: set[str] = set()
    for key in header:
        name = network_key(key)
        if name is None:
            continue
        if name not in expected or name in found:  # a key of each layout for one weight would leave the choice to chance
            problems["unexpected"].append(key)
        elif header[key].shape != expected[name]:
            problems["misshapen"].append(f"{key} {header[key].shape} instead of {expected[name]}")
        found.add(name)
    problems["missing"] = sorted(set(expected) - found)
    return {word: sorted(keys) for word, keys in problems.items()}


def load_weights(network: nn.Module, files: list[Path], *, device: str | torch.device, dtype: torch.dtype) -> None:
    """Fill `network` (on the meta device) from `files`, whose keys fit it; backbone in `dtype`, heads in float32."""
    for key, tensor in stored_tensors(files):
        name = network_key(key)
        if name is None:
            continue
        path, _, attribute = name.rpartition(".")
        module = network.get_submodule(path)
        tensor = tensor.to(torch.float32 if name.startswith("heads.") else dtype)
        if is_four_bit(module) and attribute == "weight":
            setattr(module, attribute, four_bit_weight(tensor, module, device))
        else:
            setattr(module, attribute, nn.Parameter(tensor.to(device), requires_grad=False))
