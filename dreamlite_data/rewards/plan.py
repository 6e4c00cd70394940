"""What scoring with a reward model will take, before anything is loaded: memory by part, work and time a row.
Known from the headers of the weights, config.json, tokenizer and rows alone; needs no GPU and reads no tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedConfig

from dreamlite_data.rewards.four_bit import four_bit_bytes, is_four_bit_target
from dreamlite_data.rewards.loader import network_key
from dreamlite_data.rewards.packing import batches
from dreamlite_data.rewards.preprocess import FORMATS, smart_resize
from dreamlite_data.rewards.rows import RewardInput
from dreamlite_data.rewards.spec import RewardSpec
from dreamlite_data.rewards.stored import StoredTensor
from dreamlite_data.rewards.text import RewardTokenizer, split_common

PARTS = ("vision", "decoder", "embeddings", "heads", "lm_head (dropped)")
BF16_BYTES, FLOAT32_BYTES = 2, 4

GPUS = {
    "H100 SXM": (989, 80), "A100 80 GB": (312, 80), "H20": (148, 96), "L40S": (362, 48),
    "RTX 4090": (165, 24), "A10": (125, 24), "L4": (121, 24),
}  # fmt: skip
"""Peak dense bfloat16 TFLOP/s and memory in GB, from NVIDIA's data sheets (without sparsity)."""

UTILISATION = 0.4
"""Share of the peak that is reached: what the public reports of rewards.md section 4 (EditReward on H20) agree with."""

USABLE_MEMORY = 0.9
"""Share of a GPU's memory for the model: the rest is CUDA's context and fragments."""

ATTENTION_WIDTHS = 6
"""Decoder: tensors of hidden width alive in attention besides keys and values: queries plain, rotated and half-rotated,
keys and values repeated over query heads, output."""

VISION_WIDTHS = 18
"""Vision tower: the same count for its block, whose rotation runs in float32 (each such tensor counts twice)."""

PLANNED_ROWS = 1000
"""Rows of the file that are looked at; the rest is taken to be like them."""


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Size of a row: patches (rows, columns) of each image, tokens of the trunk and of each branch."""

    grids: tuple[tuple[int, int], ...]
    trunk: int
    branches: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens in the decoder."""
        return self.trunk + sum(self.branches)

    @property
    def patches(self) -> int:
        """Patches in the vision tower."""
        return sum(rows * columns for rows, columns in self.grids)


# -- memory


def part_of(key: str) -> str:
    """The part of the model that a published state-dict key belongs to."""
    name = network_key(key)
    if name is None:
        return "lm_head (dropped)"
    if name.startswith("heads."):
        return "heads"
    if name.startswith("backbone.visual."):
        return "vision"
    return "embeddings" if ".embed_tokens." in name else "decoder"


def weight_rows(header: dict[str, StoredTensor]) -> list[dict[str, Any]]:
    """A row per part: parameters, stored type, and gigabytes stored, loaded in bfloat16 and loaded in 4 bits."""
    rows = []
    for part in PARTS:
        held = {key: stored for key, stored in header.items() if part_of(key) == part}
        if not held:
            continue
        types = sorted({str(stored.dtype).removeprefix("torch.") for stored in held.values()})
        rows.append({
            "part": part, "parameters": sum(stored.elements for stored in held.values()), "stored_as": ", ".join(types),
            "stored_gb": sum(stored.size_bytes for stored in held.values()) / 1e9,
            "bf16_gb": loaded_bytes(held, four_bit=False) / 1e9, "four_bit_gb": loaded_bytes(held, four_bit=True) / 1e9,
        })  # fmt: skip
    return rows


def loaded_bytes(header: dict[str, StoredTensor], *, four_bit: bool) -> float:
    """Bytes of the weights once loaded: backbone in bfloat16 or with 4-bit decoder layers, heads in float32, no lm_head."""
    total = 0.0
    for key, stored in header.items():
        name = network_key(key)
        if name is None:
            continue
        if four_bit and is_four_bit_target(name, stored.shape):
            total += four_bit_bytes(stored.elements)
        else:
            total += stored.elements * (FLOAT32_BYTES if name.startswith("heads.") else BF16_BYTES)
    return total


def working_bytes(config: PreTrainedConfig, batch: list[RowShape], *, four_bit: bool = False, element_bytes: int = BF16_BYTES) -> float:
    """Peak bytes of a scoring batch beside the weights: the larger of the vision tower's and the decoder's layer.

    Nothing accumulates over layers (no gradient, no cache of keys and values between passes: one pass scores a row, so a
    layer's keys and values are a part of its own working set). An estimate from the shapes of what a layer holds at once.
    """
    text, vision = config.text_config, config.vision_config
    patches = sum(row.patches for row in batch)
    patch_values = 3 * vision.temporal_patch_size * vision.patch_size**2
    tower = patches * (VISION_WIDTHS * _vision_width(config) * element_bytes + patch_values * (element_bytes + FLOAT32_BYTES))
    length = max(row.length for row in batch)
    key_width = text.hidden_size * text.num_key_value_heads // text.num_attention_heads
    layer = max(3 * text.intermediate_size, ATTENTION_WIDTHS * text.hidden_size + 3 * key_width)
    decoder = len(batch) * length * (3 * text.hidden_size + layer) * element_bytes
    if len(batch[0].branches) > 1:
        decoder += len(batch) * length**2 * (1 + element_bytes)  # who sees whom: as truth values and as the kernel adds them
    if four_bit:
        decoder += text.hidden_size * text.intermediate_size * element_bytes  # one matrix at a time is expanded
    return max(tower, decoder)


def _vision_width(config: PreTrainedConfig) -> int:
    vision = config.vision_config
    return vision.embed_dim if config.model_type == "qwen2_vl" else vision.hidden_size


# -- work


def row_flops(header: dict[str, StoredTensor], config: PreTrainedConfig, row: RowShape) -> dict[str, float]:
    """Floating point operations of one row by part: two for every weight and token, and attention's products in full."""
    names = {name: stored for key, stored in header.items() if (name := network_key(key)) and len(stored.shape) >= 2}

    def weights(prefix: str, without: str = "") -> int:
        return sum(
            stored.elements for name, stored in names.items() if name.startswith(prefix) and not (without and name.startswith(without))
        )

    text, vision = config.text_config, config.vision_config
    merger = "backbone.visual.merger."
    seen = sum(_attended(config, grid) for grid in row.grids)
    return {
        "vision": 2 * row.patches * weights("backbone.visual.", merger)
        + 2 * row.patches / vision.spatial_merge_size**2 * weights(merger)
        + 4 * seen * _vision_width(config),
        "decoder": 2 * row.length * weights("backbone.language_model.layers.")
        + 4 * text.num_hidden_layers * row.length**2 * text.hidden_size,
        "heads": 2 * weights("heads."),
    }  # fmt: skip


def _attended(config: PreTrainedConfig, grid: tuple[int, int]) -> int:
    """(query, key) pairs of patches that the vision tower's layers look at, over all layers. Qwen2.5-VL's attention stays
    within windows but for a few layers; its last windows of a side may be smaller."""
    vision, (rows, columns) = config.vision_config, grid
    everywhere = (rows * columns) ** 2
    if config.model_type == "qwen2_vl":
        return vision.depth * everywhere
    window = vision.window_size // vision.patch_size
    in_windows = _squares(rows, window) * _squares(columns, window)
    full = len(vision.fullatt_block_indexes)
    return full * everywhere + (vision.depth - full) * in_windows


def _squares(length: int, window: int) -> int:
    whole, rest = divmod(length, window)
    return whole * window**2 + rest**2


# -- rows


def row_shapes(tokenizer: RewardTokenizer, config: PreTrainedConfig, spec: RewardSpec, rows: Iterable[RewardInput]) -> Iterator[RowShape]:
    """Shapes of the rows whose images have a readable header; images are not decoded."""
    patch, merge = config.vision_config.patch_size, config.vision_config.spatial_merge_size
    for row in rows:
        try:
            sizes = [_image_size(path) for path in (row.source, row.image) if path is not None]
            sizes = [smart_resize(height, width, patch * merge, spec.min_px, spec.max_px) for width, height in sizes]
            (branches,) = tokenizer.branches([row.prompt])
        except (OSError, ValueError, TypeError):
            continue  # scoring will say what is wrong with this row
        yield _shape(tokenizer, [(height // patch, width // patch) for height, width in sizes], branches, merge)


def typical_shape(tokenizer: RewardTokenizer, config: PreTrainedConfig, spec: RewardSpec) -> RowShape:
    """A row with square images and no words, where no row is there to go by."""
    patch, merge = config.vision_config.patch_size, config.vision_config.spatial_merge_size
    height, width = smart_resize(1024, 1024, patch * merge, spec.min_px, spec.max_px)
    return _shape(tokenizer, [(height // patch, width // patch)] * spec.images, tokenizer.branches([""])[0], merge)


def _shape(tokenizer: RewardTokenizer, grids: list[tuple[int, int]], branches: list[list[int]], merge: int) -> RowShape:
    common, rest = split_common(branches)
    trunk = len(tokenizer.trunk([rows * columns // merge**2 for rows, columns in grids])) + len(common)
    return RowShape(tuple(grids), trunk, tuple(map(len, rest)))


def _image_size(path: Path) -> tuple[int, int]:
    with Image.open(path, formats=FORMATS) as image:
        return image.size


# -- the plan


@dataclasses.dataclass(frozen=True)
class Plan:
    """`weights`, `memory` and `gpus` are tables as lists of dicts; `rows` describes an average row."""

    weights: list[dict[str, Any]]
    memory: list[dict[str, Any]]
    row: dict[str, Any]
    gpus: list[dict[str, Any]]


def make_plan(
    header: dict[str, StoredTensor], config: PreTrainedConfig, shapes: Iterable[RowShape], rows: int, batch_size: int,
    utilisation: float = UTILISATION,
) -> Plan:  # fmt: skip
    """Plan the scoring of `rows` rows that are like `shapes` (the first PLANNED_ROWS of which are looked at)."""
    seen = list(islice(shapes, PLANNED_ROWS))
    cut = [[seen[index] for index in chosen] for chosen in batches([row.length for row in seen], batch_size)]
    flops = [row_flops(header, config, row) for row in seen]
    mean = {part: sum(each[part] for each in flops) / len(flops) for part in flops[0]}
    memory = []
    for name, four_bit in (("bf16", False), ("4-bit", True)):
        largest = max(cut, key=lambda batch: working_bytes(config, batch, four_bit=four_bit))
        held, working = loaded_bytes(header, four_bit=four_bit) / 1e9, working_bytes(config, largest, four_bit=four_bit) / 1e9
        one = max(working_bytes(config, [row], four_bit=four_bit) for row in seen) / 1e9
        memory.append({
            "weights_in": name, "weights_gb": held, "batch_rows": len(largest), "batch_tokens": len(largest) * max(r.length for r in largest),
            "batch_gb": working, "peak_gb": held + working, "peak_gb_one_row": held + one,
        })  # fmt: skip
    row = {
        "tokens": sum(each.length for each in seen) / len(seen), "image_patches": sum(each.patches for each in seen) / len(seen),
        "tflop_vision": mean["vision"] / 1e12, "tflop_decoder": mean["decoder"] / 1e12, "tflop": sum(mean.values()) / 1e12,
    }  # fmt: skip
    return Plan(weight_rows(header), memory, row, _gpu_rows(memory, sum(mean.values()), rows, utilisation))


def _gpu_rows(memory: list[dict[str, Any]], flops: float, rows: int, utilisation: float) -> list[dict[str, Any]]:
    found = []
    for name, (peak_tflops, memory_gb) in GPUS.items():
        seconds = flops / (peak_tflops * 1e12 * utilisation)
        fits = {
            each["weights_in"]: "yes" if each["peak_gb"] <= USABLE_MEMORY * memory_gb
            else "smaller batch" if each["peak_gb_one_row"] <= USABLE_MEMORY * memory_gb else "no"
            for each in memory
        }  # fmt: skip
        found.append({
            "gpu": name, "memory_gb": memory_gb, "peak_tflops": peak_tflops, "seconds_a_row": seconds, "rows_a_second": 1 / seconds,
            "hours": seconds * rows / 3600, "fits_bf16": fits["bf16"], "fits_4_bit": fits["4-bit"],
        })  # fmt: skip
    return found
