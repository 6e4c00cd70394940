"""Writes the files of a bundle's targets besides ONNX Runtime, measures them against torch, and describes them for the manifest.
Each target is an optional extra; nothing of it is imported unless the settings ask for it."""

from __future__ import annotations

import copy
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainers.export.measure import check_float_graphs
from trainers.export.parity import TorchReference
from trainers.export.prepare import ENCODERS, Part, part_names, prepare_part
from trainers.export.samples import compare, difference, load_samples
from trainers.export.sensitivity import Feed
from trainers.export.settings import ExportSettings
from trainers.export.source import Source
from trainers.export.target_checks import ProgramRunner

LEFT_OUT = {
    "executorch": {
        "edit_encoder": "its patches are a tensor of more axes than XNNPACK has (6); use the ONNX graph, or hidden states of your own",
    },
    "coreml": {
        name: "coremltools' reader of torch graphs knows no masks of transformers; use the ONNX graph, or hidden states of your own"
        for name in ENCODERS
    },
}
"""Parts that a target cannot have, and why; the manifest repeats it."""

NOT_RUN = "converted and read back on Linux; Core ML runs on Apple systems only, so no output of it was compared"


def write_targets(
    folder: Path,
    source: Source,
    reference: TorchReference,
    settings: ExportSettings,
    feeds: Sequence[Feed],
    quantization: dict[str, Any] | None,
) -> dict[str, Any]:
    """Write the files of every further target of the settings under folder/<target>; returns the manifest's section about them.

    folder: a bundle with its fp32 graphs, samples and manifest. feeds: inputs of the UNet's calls on the calibration rows, which
    set the ranges of int8; without them there is none. quantization: the manifest's record, whose blocks that the scan took back
    to float stay float here too. ValueError where a float program is not equal to torch.
    """
    section: dict[str, Any] = {}
    if "executorch" in settings.targets:
        blocks = quantization["unet_int8"]["float_blocks"] if feeds else []
        section["executorch"] = _write_executorch(folder, source, reference, settings, feeds, (*settings.float_layers, *blocks))
    if "coreml" in settings.targets:
        section["coreml"] = _write_coreml(folder, source, reference, settings)
    return section


def _write_executorch(
    folder: Path,
    source: Source,
    reference: TorchReference,
    settings: ExportSettings,
    feeds: Sequence[Feed],
    float_layers: Sequence[str],
) -> dict[str, Any]:
    from trainers.export.executorch import MAX_DELEGATES, lower

    (folder / "executorch").mkdir()
    files: dict[str, Any] = {}
    for name in _parts("executorch", settings):
        part = prepare_part(name, source, reference, settings, batch=1, delegable=True)
        # Encoders run once an image, and their masks and lookups are no work for XNNPACK.
        most = None if name in ENCODERS else MAX_DELEGATES
        for form in ("fp32", "int8") if name == "unet" and feeds else ("fp32",):
            lowered = lower(part, feeds if form == "int8" else (), float_layers, most)
            path = folder / "executorch" / f"{name}_{form}.pte"
            path.write_bytes(lowered.program)
            files[f"{name}_{form}"] = {
                "file": path.relative_to(folder).as_posix(),
                "bytes": len(lowered.program),
                "inputs": {port: list(value.shape) for port, value in part.inputs.items()},
                "order": list(part.inputs),  # the manifest's keys are sorted
                "delegates": lowered.delegates,
                "outside_delegates": lowered.outside,
            }
    section: dict[str, Any] = {
        "versions": {package: version(package) for package in ("executorch", "torch", "torchao")},
        "backend": "XNNPACK",
        "int8": "static: weights per output channel, activations per tensor, calibrated on the student's own trajectory",
        "float_layers": list(float_layers),
        "verified_runtime": f"{platform.system()} {platform.machine()}, CPU",
        "left_out": _left_out("executorch", settings),
        "files": files,
    }
    samples = load_samples(folder)
    forms = [form for form in ("fp32", "int8") if f"unet_{form}" in files]
    section["parity"] = {form: compare(ProgramRunner(folder, section, form, settings.threads), samples) for form in forms}
    floats = section["parity"]["fp32"]["graphs"] | section["parity"]["fp32"]["latents"]
    check_float_graphs({"graphs": {f"executorch {name}_fp32": value for name, value in floats.items()}, "end_to_end": {}}, settings)
    return section


def _write_coreml(folder: Path, source: Source, reference: TorchReference, settings: ExportSettings) -> dict[str, Any]:
    from trainers.export.coreml import check_package, check_weights, compress, convert, port_table, save_package

    (folder / "coreml").mkdir()
    files: dict[str, Any] = {}
    calls = [group.unet_inputs((source.size_px, source.size_px)) for group in load_samples(folder)]
    for name in _parts("coreml", settings):
        part = prepare_part(name, source, reference, settings, batch=1)
        with torch.no_grad():
            ports = port_table(part, part.module(**part.inputs))
        converted = convert(part)
        for weights in ("fp16", *settings.coreml_weights) if name == "unet" else ("fp16",):
            path = folder / "coreml" / f"{name}_{weights}.mlpackage"
            save_package(compress(converted.model, weights), path)
            record, stored = check_weights(path, part, converted.parameters, weights)
            files[f"{name}_{weights}"] = {
                "file": path.relative_to(folder).as_posix(),
                "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
                **ports,
                "operators": check_package(path, ports),
                "weights_read_back": record,
            }
            if name == "unet":
                files[f"{name}_{weights}"]["torch_with_stored_weights"] = _with_weights(part, stored, calls)
    return {
        "versions": {package: version(package) for package in ("coremltools", "torch")},
        "minimum_system": "iOS 18, macOS 15",
        "verified_runtime": None,
        "note": NOT_RUN,
        "left_out": _left_out("coreml", settings),
        "files": files,
    }


def _parts(target: str, settings: ExportSettings) -> list[str]:
    return [name for name in part_names(settings) if name not in LEFT_OUT[target]]


def _left_out(target: str, settings: ExportSettings) -> dict[str, str]:
    return {name: LEFT_OUT[target][name] for name in part_names(settings) if name in LEFT_OUT[target]}


def _with_weights(part: Part, weights: dict[str, torch.Tensor], calls: Sequence[Feed]) -> dict[str, float]:
    """What the stored weights alone change: torch fp32 with them against torch fp32 with the checkpoint's, on the same inputs."""
    changed = copy.deepcopy(part.module)
    changed.load_state_dict(weights, strict=False)

    @torch.no_grad()
    def answers(module: torch.nn.Module) -> np.ndarray:
        return np.concatenate([module(**{name: torch.from_numpy(value) for name, value in feed.items()}).numpy() for feed in calls])

    return difference(answers(part.module), answers(changed))
