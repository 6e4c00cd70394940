"""Writes the smaller graphs of a bundle beside the float32 ones and says which file each variant takes for each part.
Half precision and weight-only blocks need no data; the int8 UNet is calibrated on the student's own calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from trainers.export.bias_correction import correct_biases, gain_db
from trainers.export.graphs import save_clean
from trainers.export.prepare import ENCODERS, part_names
from trainers.export.quantize import SESSION_OPTIONS, quantize_unet
from trainers.export.sensitivity import Feed, first_calls
from trainers.export.settings import ExportSettings
from trainers.export.weights import store_half, store_int8, to_blocks, to_half

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
    for variant in small:
        files = {}
        for part in parts:
            # Of the VAE there is one small form: it is a tenth of the bundle and what every picture goes through.
            files[part] = f"{part}_int8.onnx" if part.startswith("vae") and variant == "int4" else f"{part}_{variant}.onnx"
            if not (folder / files[part]).is_file():
                about = _write(folder, part, variant, feeds, settings)
                record |= {f"{part}_{variant}": about} if about else {}
        entries[variant] = {"files": files, "session_options": SESSION_OPTIONS if variant == "int8" else {}}
    return entries, record or None


def _write(folder: Path, part: str, variant: str, feeds: list[Feed], settings: ExportSettings) -> dict[str, Any] | None:
    """One part in one variant; what was done to its weights, None where they are in half precision."""
    source, target = folder / f"{part}.onnx", folder / f"{part}_{variant}.onnx"
    if variant == "fp16":
        save_clean(to_half(onnx.load(source)), target)
        return None
    if part.startswith("vae"):
        return _stored_int8(source, folder / f"{part}_int8.onnx")
    if part in ENCODERS:
        return _blocks(source, target, 8 if variant == "int8" else 4, settings)
    if variant == "int8":
        return quantize_unet(source, target, feeds, settings)
    return _blocks(source, target, 4, settings, settings.float_layers, feeds)


def _stored_int8(source: Path, target: Path) -> dict[str, Any]:
    """Weights kept as int8 by output channel, float arithmetic."""
    model = onnx.load(source)
    store_int8(model, {node.name for node in model.graph.node})
    store_half(model)
    save_clean(model, target)
    return {"format": "DequantizeLinear", "bits": 8, "scheme": "symmetric, per output channel"}


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
