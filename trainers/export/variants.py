"""Writes the smaller graphs of a bundle beside the float32 ones and says which file each variant takes for each part.
Half precision and weight-only blocks need no data; the int8 UNet is calibrated on the student's own calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from trainers.export.bias_correction import correct_biases, gain_db
from trainers.export.graphs import save_clean
from trainers.export.prepare import part_names
from trainers.export.quantize import SESSION_OPTIONS, quantize_unet
from trainers.export.sensitivity import Feed, first_calls
from trainers.export.settings import ExportSettings
from trainers.export.weights import to_blocks, to_half

CORRECTION_ROWS = 4
"""Rows per task and sigma whose mean inputs the correction takes."""


def float_files(settings: ExportSettings) -> dict[str, Any]:
    """The entry of the float32 variant: one file a part, as `write_graphs` names them."""
    return {"files": {name: f"{name}.onnx" for name in sorted(part_names(settings))}, "session_options": {}}


def write_variants(folder: Path, feeds: list[Feed], settings: ExportSettings) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Write the graphs of every variant in settings.variants; returns their manifest entries and the record of quantization.

    feeds: inputs of the UNet's calls on the calibration rows; read for int8, and for int4's biases.
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
    for part, bits in (("edit_encoder", settings.edit_encoder_bits), ("text_encoder", settings.text_encoder_bits)):
        if part in parts:
            shared[part] = f"{part}_int{bits}.onnx"
            record[part] = _blocks(folder / f"{part}.onnx", folder / shared[part], bits, settings)
    if "int8" in small:
        record["unet_int8"] = quantize_unet(folder / "unet.onnx", folder / "unet_int8.onnx", feeds, settings)
        entries["int8"] = {"files": {**shared, "unet": "unet_int8.onnx"}, "session_options": SESSION_OPTIONS}
    if "int4" in small:
        record["unet_int4"] = _blocks(folder / "unet.onnx", folder / "unet_int4.onnx", 4, settings, settings.float_layers, feeds)
        entries["int4"] = {"files": {**shared, "unet": "unet_int4.onnx"}, "session_options": {}}
    return entries, record


def _blocks(
    source: Path, target: Path, bits: int, settings: ExportSettings, keep: tuple[str, ...] = (), feeds: Sequence[Feed] = ()
) -> dict[str, Any]:
    """Weights in blocks, everything else in half precision; with feeds, biases corrected where that brings the result nearer."""
    model = onnx.load(source)
    changed = to_blocks(model, bits, settings.block_values, keep)
    record: dict[str, Any] = {
        "format": "MatMulNBits", "bits": bits, "block_values": settings.block_values, "scheme": "symmetric", "layers": len(changed),
        "float_layers": list(keep),
    }  # fmt: skip
    if feeds:
        original, corrected = onnx.load(source), onnx.ModelProto()
        corrected.CopyFrom(model)
        biases = correct_biases(corrected, original, first_calls(list(feeds), CORRECTION_ROWS))
        # Judged on later rows than those it was fitted to, where there are any.
        before, after = gain_db(model, corrected, original, {name: value[-CORRECTION_ROWS:] for name, value in feeds[-1].items()})
        record["bias_correction"] = {"biases": biases, "psnr_db_without": before, "psnr_db_with": after, "kept": after > before}
        model = corrected if after > before else model
    save_clean(to_half(model), target)
    return record
