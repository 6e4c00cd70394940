"""What the full-size network costs to export: seconds, bytes and memory of each graph, and one call of it beside torch.
Random weights of the official configuration, so nothing is downloaded; each stage is a process, so that its memory is its own."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from diffusers import AutoencoderTiny, DreamLiteUNetModel
from safetensors.torch import save_file
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from trainers.export.encoder_weights import FILE_BYTES, stored_tensor, unpack, write_encoder
from trainers.export.graphs import save_clean, write_graph
from trainers.export.prepare import UNET_INPUTS, UNetGraph, VaeDecoderGraph, VaeEncoderGraph
from trainers.export.quantize import SESSION_OPTIONS, quantize_unet
from trainers.export.samples import difference
from trainers.export.sessions import session
from trainers.export.settings import ExportSettings, Variant
from trainers.export.weights import to_blocks, to_half
from trainers.model import OFFICIAL_PARAMETERS, build_unet
from trainers.settings import ModelSettings

ENCODER_LIMIT_MB = 1800.0
"""Most that the released encoder's weights may take in 4 bits, with its vision tower in 16."""

LIMITS_MB = {"fp32": 1565.0, "fp16": 785.0, "int8": 400.0, "int4": 245.0}
"""Most that the UNet's file may take; the paper's own W8A8 file has 393.9 MB."""

LEAST_DB = {"fp32": 100.0, "fp16": 60.0, "int8": 35.0, "int4": 35.0}
"""Least PSNR of one call against torch. Random weights lack the outliers of trained ones: this finds bugs, not quality."""

ENCODER_TEXT = {
    "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
ENCODER_VISION = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2048, "patch_size": 16,
    "deepstack_visual_indexes": [5, 11, 17], "num_position_embeddings": 2304,
}  # fmt: skip
ENCODER_PARAMETERS = 2_127_532_032
"""Qwen3-VL-2B-Instruct, the encoder of the release: 4.255 GB in bfloat16."""

TEXT_WIDTH, SEQUENCE_TOKENS, LATENT_CHANNELS, SCALE = 2048, 128, 4, 8


def measure_full_size(folder: Path, size_px: int, variants: Sequence[Variant], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Export the 0.39 B UNet for `size_px` in every variant, and the VAE, into `folder`; one row a graph.

    Row: graph, variant, megabytes, limit_mb, export_s, export_cpu_s, export_peak_mb, call_s, call_cpu_s, call_peak_mb, psnr_db, ok; _s by
    the clock, _cpu_s of the processor alone, which a busy machine does not stretch. The text encoder (2 B) is no graph: with int4, its
    weights are packed, and psnr_db is that of a layer's weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for part in ("vae_encoder", "vae_decoder"):
        export = _alone(say, f"{part} fp32", _export_vae, folder, part, size_px)
        rows.append(_row(folder / f"{part}.onnx", part, "fp32", None, export, None))
    first = _alone(say, "unet fp32", _export_unet, folder, size_px)
    for variant in ("fp32", *(name for name in variants if name != "fp32")):
        path = folder / ("unet.onnx" if variant == "fp32" else f"unet_{variant}.onnx")
        export = first if variant == "fp32" else _alone(say, f"unet {variant}", _shrink_unet, folder, variant)
        call = _alone(say, f"unet {variant}, one call", _call_unet, folder, path, variant)
        rows.append(row := _row(path, "unet", variant, LIMITS_MB[variant], export, call))
        say(f"unet {variant}: {row['megabytes']} MB, {row['psnr_db']} dB against torch, {'as it should be' if row['ok'] else 'SHORT'}")
    if "int4" in variants:
        _alone(say, "text_encoder, random weights", _make_encoder, folder)
        export = _alone(say, "text_encoder int4", _pack_encoder, folder)
        size_mb = sum(path.stat().st_size for path in (folder / "encoder_int4").glob("*.safetensors")) / 1e6
        rows.append(_row_of("text_encoder", "int4", size_mb, ENCODER_LIMIT_MB, export) | {"psnr_db": export["psnr_db"]})
    return rows


def _row(
    path: Path, graph: str, variant: str, limit: float | None, export: dict[str, float], call: dict[str, float] | None
) -> dict[str, Any]:
    row = _row_of(graph, variant, path.stat().st_size / 1e6, limit, export)
    if call is None:
        return row
    took = {"call_s": call["seconds"], "call_cpu_s": call["cpu_seconds"], "call_peak_mb": call["peak_mb"], "psnr_db": call["psnr_db"]}
    return row | took | {"ok": row["ok"] and call["psnr_db"] >= LEAST_DB[variant]}


def _row_of(graph: str, variant: str, megabytes: float, limit: float | None, export: dict[str, float]) -> dict[str, Any]:
    return {
        "graph": graph, "variant": variant, "megabytes": round(megabytes, 1), "limit_mb": limit, "export_s": export["seconds"],
        "export_cpu_s": export["cpu_seconds"], "export_peak_mb": export["peak_mb"], "ok": limit is None or megabytes <= limit,
    }  # fmt: skip


def _alone(say: Callable[[str], None], name: str, work: Callable[..., dict[str, float]], *inputs: Any) -> dict[str, float]:
    """`work` in a process of its own, with the seconds and peak memory (MB) it took there, where it does not say its own seconds.

    ValueError where the system ends that process, which it does when memory runs out.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            found = pool.submit(_measured, work, inputs).result()
        except BrokenProcessPool:
            raise ValueError(
                f"the process of '{name}' was ended from outside, most likely for want of memory: float graphs take 8 GB, int8 takes "
                "17 GB; free some, or choose other graphs with --variant."
            ) from None
    say(f"{name}: {found['seconds']:.1f} s, {found['cpu_seconds']:.1f} s of the processor, {found['peak_mb']:.0f} MB of memory at most")
    return found


def _measured(work: Callable[..., dict[str, float]], inputs: tuple[Any, ...]) -> dict[str, float]:
    torch.set_num_threads(1)
    found, took = _timed(lambda: work(*inputs), 1)
    # Linux counts ru_maxrss in KiB.
    return {**took, "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024), **found}


def _timed(work: Callable[[], Any], digits: int) -> tuple[Any, dict[str, float]]:
    """What `work` returns, and the seconds it took by the clock and of the processor."""
    began, cpu_began = time.perf_counter(), time.process_time()
    found = work()
    return found, {"seconds": round(time.perf_counter() - began, digits), "cpu_seconds": round(time.process_time() - cpu_began, digits)}


def _official(size_px: int) -> DreamLiteUNetModel:
    unet = build_unet(ModelSettings(preset="official", size_px=size_px), TEXT_WIDTH, size_px // SCALE).eval()
    parameters = sum(value.numel() for value in unet.parameters())
    if parameters != OFFICIAL_PARAMETERS:
        raise ValueError(f"the official UNet has {OFFICIAL_PARAMETERS:,} parameters, the installed diffusers builds one of {parameters:,}.")
    return unet


def _unet_inputs(size_px: int, batch: int) -> dict[str, torch.Tensor]:
    noise, side = torch.Generator().manual_seed(0), size_px // SCALE
    kept = torch.arange(SEQUENCE_TOKENS) < SEQUENCE_TOKENS // 2
    values = (
        torch.randn(batch, LATENT_CHANNELS, side, 2 * side, generator=noise),
        torch.full((batch,), 849.23),
        torch.randn(batch, SEQUENCE_TOKENS, TEXT_WIDTH, generator=noise),
        kept.long().expand(batch, -1),
        torch.full((batch, 2), float(size_px)),
    )
    return dict(zip(UNET_INPUTS, values, strict=True))


@torch.no_grad()
def _export_unet(folder: Path, size_px: int) -> dict[str, float]:
    """folder/unet.onnx, and folder/call.npz: one call's inputs and what torch makes of them with its stock attention."""
    unet = _official(size_px)
    call = _unet_inputs(size_px, 1)
    given = dict(call)
    time_ids = given.pop("time_ids")
    velocity = unet(**given, added_cond_kwargs={"time_ids": time_ids}, return_dict=False)[0]
    np.savez(folder / "call.npz", velocity=velocity.numpy(), **{name: value.numpy() for name, value in call.items()})
    write_graph(UNetGraph(unet), _unet_inputs(size_px, 2), "velocity", folder / "unet.onnx")
    return {}


def _export_vae(folder: Path, part: str, size_px: int) -> dict[str, float]:
    """One half of the released VAE's architecture (TAESDXL: the class defaults of AutoencoderTiny)."""
    vae, side = AutoencoderTiny(), size_px // SCALE
    if part == "vae_encoder":
        write_graph(VaeEncoderGraph(vae), {"image": torch.zeros(2, 3, size_px, size_px)}, "latent", folder / "vae_encoder.onnx")
    else:
        write_graph(VaeDecoderGraph(vae), {"latent": torch.zeros(2, LATENT_CHANNELS, side, side)}, "image", folder / "vae_decoder.onnx")
    return {}


def _shrink_unet(folder: Path, variant: Variant) -> dict[str, float]:
    """folder/unet_<variant>.onnx from folder/unet.onnx, int8 calibrated on the one call (a size and a speed, not a quality)."""
    settings, target = ExportSettings(scan_rows=0), folder / f"unet_{variant}.onnx"
    if variant == "int8":
        quantize_unet(folder / "unet.onnx", target, [_stored_call(folder)[0]], settings)
        return {}
    model = onnx.load(folder / "unet.onnx")
    if variant == "int4":
        to_blocks(model, 4, settings.block_values, settings.float_layers)
    save_clean(to_half(model), target)
    return {}


def _make_encoder(folder: Path) -> dict[str, float]:
    """folder/encoder: a checkpoint in the released encoder's layout and type, random but for its shapes, a file for each gigabyte."""
    config = Qwen3VLConfig(text_config=ENCODER_TEXT, vision_config=ENCODER_VISION, tie_word_embeddings=True)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Qwen3VLForConditionalGeneration(config).named_parameters()}
    parameters = sum(shape.numel() for shape in shapes.values())
    if parameters != ENCODER_PARAMETERS:
        raise ValueError(f"the released encoder has {ENCODER_PARAMETERS:,} parameters, the installed transformers builds one of {parameters:,}.")
    target = folder / "encoder" / "text_encoder"
    for path in (target, folder / "encoder" / "tokenizer", folder / "encoder" / "processor"):
        path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(target)
    noise, held = torch.Generator().manual_seed(0), {}
    for number, (name, shape) in enumerate(shapes.items()):
        held[name] = torch.randn(shape, generator=noise).mul_(0.02).to(torch.bfloat16)
        if number == len(shapes) - 1 or sum(value.nbytes for value in held.values()) > FILE_BYTES:
            save_file(held, target / f"model-{number:05d}.safetensors")
            held = {}
    return {}


def _pack_encoder(folder: Path) -> dict[str, float]:
    """folder/encoder_int4, and the PSNR of one layer's weights."""
    settings, target = ExportSettings(), folder / "encoder_int4"
    shutil.rmtree(target, ignore_errors=True)
    _, took = _timed(lambda: write_encoder(folder / "encoder", target, 4, settings.encoder_block_values), 1)
    stem = "model.language_model.layers.0.mlp.down_proj"
    packed = [stored_tensor(target, f"{stem}.{part}") for part in ("weight", "scales", "biases")]
    weight = stored_tensor(folder / "encoder" / "text_encoder", f"{stem}.weight").float()
    return {**took, "psnr_db": difference(weight.numpy(), unpack(*packed, 4).numpy())["psnr_db"]}


def _call_unet(folder: Path, path: Path, variant: Variant) -> dict[str, float]:
    """Seconds of one call and its PSNR against torch's."""
    feed, velocity = _stored_call(folder)
    ready = session(path, entries=SESSION_OPTIONS if variant == "int8" else {})
    found, took = _timed(lambda: ready.run(None, feed)[0], 2)
    return {**took, "psnr_db": difference(velocity, found)["psnr_db"]}


def _stored_call(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    with np.load(folder / "call.npz", allow_pickle=False) as stored:
        return {name: stored[name] for name in UNET_INPUTS}, stored["velocity"]
