"""Writes the files of a bundle's targets besides ONNX Runtime, measures them against torch, and describes them for the manifest.
Each target is an optional extra; nothing of it is imported unless the settings ask for it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainers.export.measure import Embedder, check_float_graphs, trajectory
from trainers.export.parity import TorchReference, difference, kept
from trainers.export.prepare import Part, part_names, prepare_part
from trainers.export.rows import TASKS, Row
from trainers.export.source import Source
from trainers.export.target_checks import ProgramRunner, probe

COREML_NOT_RUN = "converted and read back on Linux; Core ML runs on Apple systems only, so no output of it was compared"


def write_targets(
    folder: Path, source: Source, reference: TorchReference, hidden: Embedder, calibration: Sequence[Row], parity: Sequence[Row]
) -> dict[str, Any]:
    """Write the files of every target in the settings under folder/<target> and return the manifest's section about them.

    hidden.runner runs the bundle's own fp32 graphs, whose UNet inputs on `calibration` set the ranges of int8.
    """
    settings, section = hidden.settings, {}
    if "executorch" in settings.targets:
        section["executorch"] = _write_executorch(folder, source, reference, hidden, calibration, parity)
    if "coreml" in settings.targets:
        section["coreml"] = _write_coreml(folder, source, reference, hidden, parity)
    return section


def _write_executorch(
    folder: Path, source: Source, reference: TorchReference, hidden: Embedder, calibration: Sequence[Row], parity: Sequence[Row]
) -> dict[str, Any]:
    from trainers.export.executorch import lower

    settings = hidden.settings
    (folder / "executorch").mkdir()
    files: dict[str, Any] = {}
    for name in part_names(settings):
        part = prepare_part(name, source, reference, settings, batch=1, delegable=True)
        for form in ("fp32", "int8") if name == "unet" and settings.quantize else ("fp32",):
            feeds = trajectory(hidden.runner, hidden, calibration) if form == "int8" else []
            lowered = lower(part, feeds, settings.float_layers)
            path = folder / "executorch" / f"{name}_{form}.pte"
            path.write_bytes(lowered.program)
            files[f"{name}_{form}"] = {
                "file": path.relative_to(folder).as_posix(),
                "inputs": {port: list(value.shape) for port, value in part.inputs.items()},
                "delegates": lowered.delegates,
                "outside_delegates": lowered.outside,
            }
    section = {
        "versions": {package: version(package) for package in ("executorch", "torch", "torchao")},
        "backend": "XNNPACK",
        "int8": "static, weights per output channel, activations per tensor, calibrated on the student's own trajectory",
        "runtime_verified": True,
        "files": files,
    }
    forms = [form for form in ("fp32", "int8") if f"unet_{form}" in files]
    section["parity"] = {
        form: _parity(ProgramRunner(folder, section, form, settings.threads), reference, hidden, parity) for form in forms
    }
    floats = {f"executorch {name}": value for name, value in section["parity"]["fp32"].items()}
    check_float_graphs({"graphs": floats, "end_to_end": {}}, settings)
    section["probe"] = {form: probe(folder, section, form, settings.threads) for form in forms}
    return section


def _parity(runner: ProgramRunner, reference: TorchReference, hidden: Embedder, rows: Sequence[Row]) -> dict[str, Any]:
    """Each program against torch fp32 on the rows, and the latents after all steps (`end_to_end_<task>`)."""
    report: dict[str, Any] = {}
    for task in TASKS:
        group = [row for row in rows if row.task == task]
        if not group:
            continue
        texts, images = [row.text for row in group], [row.image for row in group]
        noise, embeddings = runner.initial_noise([row.seed for row in group]), reference.embed(group)
        states, mask = hidden(group)
        condition = np.zeros_like(noise)
        if task == "edit":
            condition = reference.encode_images(images)
            report["vae_encoder"] = difference(condition, runner.encode_images(images))
        if "text_encoder" in runner.programs:
            name = "text_encoder" if task == "generate" else "edit_encoder"
            told = runner.encode_prompts(texts) if task == "generate" else runner.encode_edits(images, texts)
            report[name] = difference(kept(embeddings.states.numpy(), embeddings.mask.numpy()), kept(*told))
        feeds: list[dict[str, np.ndarray]] = []
        latents = runner.denoise(noise, condition, states, mask, lambda _index, feed, feeds=feeds: feeds.append(feed))
        truth = np.stack([reference.velocity(feed) for feed in feeds])
        report[f"unet_{task}"] = difference(truth, np.stack([runner.run_graph("unet", feed) for feed in feeds]))
        expected = reference.denoise(noise, condition, embeddings)
        report[f"end_to_end_{task}"] = difference(expected, latents)
        report["vae_decoder"] = difference(reference.decode(expected), runner.run_graph("vae_decoder", {"latent": expected}))
    return report


def _write_coreml(
    folder: Path, source: Source, reference: TorchReference, hidden: Embedder, parity: Sequence[Row]
) -> dict[str, Any]:
    from trainers.export.coreml import check_package, check_weights, compress, convert, port_table, save_package

    settings = hidden.settings
    (folder / "coreml").mkdir()
    files: dict[str, Any] = {}
    feeds = trajectory(hidden.runner, hidden, parity)
    for name in part_names(settings):
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
                files[f"{name}_{weights}"]["torch_with_stored_weights"] = _with_weights(part, stored, feeds)
    return {
        "versions": {package: version(package) for package in ("coremltools", "torch")},
        "minimum_system": "iOS 18, macOS 15",
        "runtime_verified": False,
        "runtime_note": COREML_NOT_RUN,
        "files": files,
    }


def _with_weights(part: Part, weights: dict[str, torch.Tensor], feeds: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """What the stored weights alone change: torch fp32 with them against torch fp32 with the checkpoint's, on the same inputs."""
    changed = copy.deepcopy(part.module)
    changed.load_state_dict(weights, strict=False)

    @torch.no_grad()
    def answers(module: torch.nn.Module) -> np.ndarray:
        return np.concatenate([module(**{name: torch.from_numpy(value) for name, value in feed.items()}).numpy() for feed in feeds])

    return difference(answers(part.module), answers(changed))
