"""Static int8 of the exported UNet: QDQ, one scale per output channel, calibrated on the student's own trajectory.
Records the machine too, for int8 on x86 without VNNI is wrong unless the session is told to be careful."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from trainers.export.graphs import save_clean
from trainers.export.quiet import log_level
from trainers.export.sensitivity import Feed, first_calls, mix, run_as_written, scan, with_float
from trainers.export.settings import ExportSettings
from trainers.export.weights import store_half, store_int8

SESSION_OPTIONS = {"session.x64quantprecision": "1"}
"""U8 activations times S8 weights saturate in AVX2's 16-bit adds (microsoft/onnxruntime#6004): latents of the small
world's UNet came out at 37 dB instead of 54 dB. This option takes the exact kernels; elsewhere it changes nothing."""

CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")


class _Feeds(CalibrationDataReader):
    def __init__(self, feeds: list[Feed]) -> None:
        self._left: Iterator[Feed] = iter(feeds)

    def get_next(self) -> Feed | None:
        """The next UNet input, or None after the last."""
        return next(self._left, None)


def quantize_unet(source: Path, target: Path, feeds: list[Feed], settings: ExportSettings) -> dict[str, Any]:
    """Write the int8 UNet of `source` to `target` and return the record for the manifest.

    feeds: inputs of every UNet call of the calibration rows, all deployed sigmas in equal number.
    Convolutions and matrix products with a constant weight become int8; attention products, norms and the layers of
    settings.float_layers compute in float, those on int8 weights where they are large, and so do blocks that the sensitivity
    scan finds too harmful, on weights in half precision, as far as the size allows.
    """
    if not feeds:
        raise ValueError("int8 export needs calibration rows; pass calibration=[...] or leave int8 out of export.variants.")
    model = onnx.load(source)
    chosen, kept = _choose_nodes(model, settings.float_layers)
    if not chosen:
        raise ValueError(f"export.float_layers {list(settings.float_layers)} leaves nothing to quantize in {source}.")
    percentile = settings.calibration_method == "percentile"
    with log_level(logging.ERROR):  # the quantizer logs advice on pre-processing that does not hold for this graph
        quantize_static(
            str(source),
            str(target),
            _Feeds(feeds),
            quant_format=QuantFormat.QDQ,
            per_channel=settings.per_channel,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8 if settings.weight_type == "int8" else QuantType.QUInt8,
            nodes_to_quantize=chosen,
            calibrate_method=CalibrationMethod.Percentile if percentile else CalibrationMethod.MinMax,
            extra_options={"CalibPercentile": settings.calibration_percentile} if percentile else {},
        )
    quantized, scanned, back, reached = _mixed(onnx.load(target), model, chosen, feeds, settings, source.stat().st_size)
    store_int8(quantized, kept)
    share = _int8_share(quantized)
    store_half(quantized)
    save_clean(quantized, target)
    return {
        "format": "QDQ",
        "activations": "uint8",
        "weights": settings.weight_type,
        "per_channel": settings.per_channel,
        "calibration": {
            "method": settings.calibration_method,
            "file": "calibration.json",
            "unet_calls": len(feeds),
            "samples": int(sum(len(feed["sample"]) for feed in feeds)),
            "timesteps": sorted({round(float(feed["timestep"][0]), 4) for feed in feeds}, reverse=True),
        },
        "int8_layers": len(chosen),
        "float_layers": kept,
        "float_blocks": back,
        "scan": scanned,
        "scan_psnr_db": reached,
        "int8_weight_share": share,
        "cpu_flags": cpu_flags(),
    }


def _mixed(
    quantized: onnx.ModelProto, original: onnx.ModelProto, chosen: list[str], feeds: list[Feed], settings: ExportSettings, fp32_bytes: int
) -> tuple[onnx.ModelProto, list[dict[str, Any]], list[str], float | None]:
    """The graph with residual streams in full precision and harmful blocks in float; the scan, the blocks, the PSNR reached in dB."""
    quantized = with_float(quantized, original, set())
    if settings.scan_rows == 0:
        return quantized, [], [], None
    probe = [first_calls(feeds, settings.scan_rows)]
    ranked = scan(quantized, original, chosen, probe, run_as_written)
    spare = int(settings.int8_size_share * fp32_bytes) - quantized.ByteSize()
    mixed, back, reached = mix(
        quantized, original, ranked, chosen, probe, run_as_written, psnr_target_db=settings.int8_psnr_db, spare_bytes=spare
    )
    return mixed, ranked, back, reached


def cpu_flags() -> list[str]:
    """Vector extensions of this machine that decide how int8 is computed (empty where /proc/cpuinfo is not there)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    words = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [flag for flag in CPU_FLAGS if flag in words]


def _choose_nodes(model: onnx.ModelProto, float_layers: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Names of the nodes with a constant weight: those to quantize, and those that float_layers keeps."""
    constants = {tensor.name for tensor in model.graph.initializer}
    chosen, kept = [], []
    for node in model.graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm") and node.input[1] in constants:
            (kept if any(part in node.name for part in float_layers) else chosen).append(node.name)
    return chosen, kept


def _int8_share(model: onnx.ModelProto) -> float:
    """Share of all stored weight values that are 8 bit."""
    sizes = {8: 0, 32: 0}
    for tensor in model.graph.initializer:
        small = tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
        sizes[8 if small else 32] += int(np.prod(tensor.dims))
    return round(sizes[8] / max(sum(sizes.values()), 1), 4)
