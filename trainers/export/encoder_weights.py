"""The text encoder's own weights for a phone, where it is no graph of the bundle: blocks of few bits in the layout that MLX reads.
Tensors pass through one by one, so that an encoder of 2 B takes the memory of one output file and not of its float weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trainers.model import read_json

FOLDER = "text_encoder"
FILE_BYTES = 1_000_000_000
CHUNK_ROWS = 4096
"""Rows of a weight that are packed at once: an embedding of 150,000 rows would take gigabytes as integers."""
WORD_BITS = 32
SMALLEST_SCALE = 1e-7

READ_VALUES = 64
"""mlx-vlm takes a matrix whose number of values is no multiple of this for one that was never packed."""

LANGUAGE = "language_model."
"""Only these weights are packed: the vision tower is small, sees every source picture, and stays in half precision (as in MLX's own
conversions of Qwen3-VL)."""
LANGUAGE_HEAD = "lm_head."
"""Left out: an encoder's states are read, never its words."""


def write_encoder(checkpoint: Path, target: Path, bits: int, group: int) -> dict[str, Any]:
    """Write the encoder of a checkpoint to `target` as MLX loads it (`mlx_vlm.load`, mlx-swift): packed weights, config, tokenizer,
    processor. Returns the record for the manifest; ValueError where the checkpoint holds nothing to pack.

    A matrix (rows, columns) of the language model becomes `weight` uint32 (rows, columns * bits / 32), lowest bits first, with `scales`
    and `biases` (rows, columns / group): value = scale * integer + bias. Everything else is kept in 16 bits.
    """
    target.mkdir(parents=True)
    places: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    packed = values = 0

    def save() -> None:
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(held, target / name)
        places.update(dict.fromkeys(held, name))
        held.clear()

    for name, tensor in _stored(checkpoint / "text_encoder"):
        if name.startswith(LANGUAGE_HEAD):
            continue
        dtype = tensor.dtype if tensor.element_size() == 2 else torch.float16
        found = {name: tensor.to(dtype).contiguous()}
        if LANGUAGE in name and name.endswith(".weight") and tensor.ndim == 2 and tensor.shape[1] % group == tensor.numel() % READ_VALUES == 0:
            found = pack(name.removesuffix(".weight"), tensor, bits, group, dtype)
            packed, values = packed + 1, values + tensor.numel()
        if held and _bytes(held) + _bytes(found) > FILE_BYTES:
            save()
        held |= found
    if not packed:
        raise ValueError(f"{checkpoint / 'text_encoder'} has no weight of a language model whose rows are multiples of {group} values.")
    save()
    index = {"metadata": {}, "weight_map": dict(sorted(places.items()))}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    _write_side_files(checkpoint, target, bits, group)
    return {
        "folder": target.name,
        "format": "MLX affine",
        "bits": bits,
        "group_values": group,
        "layers": packed,
        "values": values,
        "bytes": sum(path.stat().st_size for path in target.glob("*.safetensors")),
    }


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as opened:
            for name in sorted(opened.keys()):
                yield name, opened.get_tensor(name)


def stored_tensor(folder: Path, name: str) -> Tensor:
    """One tensor of a folder of safetensors files; KeyError where none holds it."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as opened:
            if name in opened.keys():  # noqa: SIM118, no mapping
                return opened.get_tensor(name)
    raise KeyError(f"no file in {folder} holds {name}")


def pack(name: str, weight: Tensor, bits: int, group: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """`name`.weight, .scales and .biases of a matrix (rows, columns), by the rule of MLX's affine quantization: the end of a group that
    is further from zero, and zero itself, are kept exactly but for the rounding of scales to `dtype`."""
    parts = [_pack_rows(rows, bits, group, dtype) for rows in weight.split(CHUNK_ROWS)]
    return {f"{name}.{part}": torch.cat([found[place] for found in parts]) for place, part in enumerate(("weight", "scales", "biases"))}


def _pack_rows(weight: Tensor, bits: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    top = 2**bits - 1
    groups = weight.float().unflatten(1, (-1, group))
    low, high = groups.amin(-1), groups.amax(-1)
    from_low = low.abs() > high.abs()
    scale = ((high - low) / top).clamp(min=SMALLEST_SCALE)
    scale = torch.where(from_low, scale, -scale)
    edge = torch.where(from_low, low, high)
    steps = (edge / scale).round()
    scale = torch.where(steps != 0, edge / steps, scale).to(dtype)
    bias = torch.where(steps != 0, edge, torch.zeros(())).to(dtype)
    # Against the scales as they are stored, so that their rounding is made up for where it can be.
    integers = ((groups - bias.float()[..., None]) / scale.float()[..., None]).round().clamp(0, top).long()
    words = integers.flatten(1).unflatten(1, (-1, WORD_BITS // bits)) << torch.arange(0, WORD_BITS, bits)
    return words.sum(-1).to(torch.uint32), scale, bias


def unpack(words: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """float32 (rows, columns) of a packed matrix."""
    integers = (words.long()[..., None] >> torch.arange(0, WORD_BITS, bits)) & (2**bits - 1)
    groups = integers.flatten(1).unflatten(1, (scales.shape[1], -1))
    return (groups * scales.float()[..., None] + biases.float()[..., None]).flatten(1)


def load_packed(model: nn.Module, folder: Path, bits: int) -> None:
    """Give a module of the stock class the values that a packed encoder stands for, in place; ValueError where a name is not the module's."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as opened:
                names = set(opened.keys())
                for name in sorted(names):
                    if name.endswith((".scales", ".biases")):
                        continue
                    if name not in parameters:
                        raise ValueError(f"{path} holds {name}, which {type(model).__name__} does not have; the checkpoint has other names.")
                    stem, tensor = name.removesuffix(".weight"), opened.get_tensor(name)
                    if f"{stem}.scales" not in names:
                        parameters[name].copy_(tensor)
                        continue
                    scales, biases = opened.get_tensor(f"{stem}.scales"), opened.get_tensor(f"{stem}.biases")
                    for start in range(0, len(tensor), CHUNK_ROWS):
                        rows = slice(start, start + CHUNK_ROWS)
                        parameters[name][rows] = unpack(tensor[rows], scales[rows], biases[rows], bits)


def _write_side_files(checkpoint: Path, target: Path, bits: int, group: int) -> None:
    for part in ("processor", "tokenizer"):
        for path in sorted((checkpoint / part).iterdir()):
            shutil.copyfile(path, target / path.name)
    config = read_json(checkpoint / "text_encoder" / "config.json")
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True  # there is no head of its own to load
    # transformers 5 renamed what MLX reads by the names in the released Qwen3-VL configs.
    rope = config["text_config"].get("rope_parameters")
    if rope and "rope_theta" not in config["text_config"]:
        config["text_config"] |= {"rope_theta": rope["rope_theta"], "rope_scaling": {key: rope[key] for key in rope if key != "rope_theta"}}
    if "vision_config" in config:
        config["vision_config"]["model_type"] = config["model_type"]
    config["quantization"] = {"group_size": group, "bits": bits}
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
