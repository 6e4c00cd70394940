"""Writes the smaller graphs of a bundle beside the float32 ones and says which file each variant takes for each part.
Half precision and weight-only blocks need no data; the int8 UNet is calibrated on the student's own calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from trainers.export.graphs import save_clean
from trainers.export.prepare import ENCODERS, part_names
from trainers.export.quantize import SESSION_OPTIONS, quantize_unet
from trainers.export.sensitivity import Feed
from trainers.export.settings import ExportSettings
from trainers.export.weights import to_blocks, to_half


def float_files(settings: ExportSettings) -> dict[str, Any]:
    """The entry of the float32 variant: one file a part, as `write_graphs` names them."""
    return {"files": {name: f"{name}.onnx" for name in sorted(part_names(settings))}, "session_options": {}}


def write_variants(folder: Path, feeds: list[Feed], settings: ExportSettings) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Write the graphs of every variant in settings.variants; returns their manifest entries and the record of quantization.

    feeds: inputs of the UNet's calls on the calibration rows; read for int8 alone.
    """
    parts = sorted(part_names(settings))
    entries: dict[str, Any] = {"fp32": float_files(settings)}
    record: dict[str, Any] = {}
    small = [name for name in settings.variants if name != "fp32"]
    for part in parts if small else []:
        if not part.startswith("vae") and "fp16" not in small:
            continue
        save_clean(to_half(onnx.load(folder / f"{part}.onnx")), folder / f"{part}_fp16.onnx")
    if "fp16" in small:
        entries["fp16"] = {"files": {part: f"{part}_fp16.onnx" for part in parts}, "session_options": {}}
    if not set(small) & {"int8", "int4"}:
        return entries, None

    shared = {part: f"{part}_fp16.onnx" for part in parts if part.startswith("vae")}
    for part in (part for part in parts if part in ENCODERS):
        shared[part] = f"{part}_int{settings.encoder_bits}.onnx"
        record[part] = _blocks(folder / f"{part}.onnx", folder / shared[part], settings.encoder_bits, settings, ())
    if "int8" in small:
        record["unet_int8"] = quantize_unet(folder / "unet.onnx", folder / "unet_int8.onnx", feeds, settings)
        entries["int8"] = {"files": {**shared, "unet": "unet_int8.onnx"}, "session_options": SESSION_OPTIONS}
    if "int4" in small:
        record["unet_int4"] = _blocks(folder / "unet.onnx", folder / "unet_int4.onnx", 4, settings, settings.float_layers)
        entries["int4"] = {"files": {**shared, "unet": "unet_int4.onnx"}, "session_options": {}}
    return entries, record


def _blocks(source: Path, target: Path, bits: int, settings: ExportSettings, keep: tuple[str, ...]) -> dict[str, Any]:
    """Weights in blocks, everything else in half precision."""
    model = onnx.load(source)
    changed = to_blocks(model, bits, settings.block_values, keep)
    save_clean(to_half(model), target)
    return {"format": "MatMulNBits", "bits": bits, "block_values": settings.block_values, "scheme": "symmetric", "layers": len(changed)}
