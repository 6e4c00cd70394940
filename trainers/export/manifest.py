"""The manifest of a bundle: every constant that a runner must share with training, and the hash of every file.
Holds no times and no paths, so that equal inputs on one machine give an equal manifest."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainers.export.ports import read_ports
from trainers.export.prepare import part_names
from trainers.export.quantize import cpu_flags
from trainers.export.runner import MAX_BATCH, SCHEMA_VERSION
from trainers.export.settings import ExportSettings
from trainers.export.source import Source, directory_digest


def draft_manifest(
    source: Source, pad_token_id: int, settings: ExportSettings, lineage: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Everything known once the float graphs lie in `folder`; enough for the runner to run them."""
    side, vision = source.latent_px, source.vision
    return {
        "schema_version": SCHEMA_VERSION,
        "artifact_id": "",
        "checkpoint_digest": source.digest,
        "lineage": lineage,
        "settings": settings.model_dump(mode="json"),
        "graphs": {name: read_ports(folder / f"{name}.onnx") for name in sorted(part_names(settings))},
        "shapes": {
            "image": {"width": source.size_px, "height": source.size_px},
            "latent": {"channels": source.latent_channels, "height": side, "width": side},
            "sequence_tokens": settings.sequence_tokens,
            "max_batch": MAX_BATCH,
        },
        "sampler": {
            "rule": "x += (sigma_next - sigma) * v; v = left half of UNet([x | condition]); timestep = 1000 * sigma",
            "condition": "generate: zeros; edit: VAE latent of the source",
            "time_ids": "(width, height) of one panel in px",
            "noise": "row i: numpy.random.Generator(PCG64(seed_i)).standard_normal((C, h, w), float32)",
            "steps": settings.steps,
            "sequence_length": side * side // 4,
            "scheduler": {key: value for key, value in source.scheduler.items() if not key.startswith("_")},
            "sigmas": source.sigmas(settings.steps),
        },
        "prompts": source.prompts(),
        "encoder": {
            "name": "Qwen3VLForConditionalGeneration",
            "width": source.text_width,
            "hidden_state": source.hidden_state,
            "pad_token_id": pad_token_id,
            "digest": directory_digest(source.directory / "text_encoder"),
            "exported": settings.text_encoder,
            "mask": "1 keeps a token, 0 adds -10000 to its scores",
            "padding": "right, with pad_token_id; states times mask",
        },
        "vision": {
            "resize_px": vision.resize_px,
            "grid_px": list(vision.grid_px),
            "tokens": vision.tokens,
            "mean": list(vision.mean),
            "std": list(vision.std),
        },
        "vae": {
            "image_range": [-1.0, 1.0],
            "scaling_factor": source.vae_scaling,
            "shift_factor": source.vae_shift,
        },
        "quantization": None,
        "verified_runtime": {"onnxruntime": f"{platform.system()} {platform.machine()}, CPU"},
        "licences": {
            "code": "Apache-2.0",
            "weights": settings.weights_licence,
            "derived_from_release": settings.derived_from_release,
            "non_commercial": "-NC-" in settings.weights_licence,
        },
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "numpy")},
        "machine": {"architecture": platform.machine(), "cpu_flags": cpu_flags()},
    }


def file_table(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 of every file but the manifest, by path."""
    table = {}
    for path in sorted(item for item in folder.rglob("*") if item.is_file() and item.name != "manifest.json"):
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        table[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return table


def graph_sizes(manifest: dict[str, Any]) -> dict[str, int]:
    """Bytes of each ONNX file."""
    return {name: entry["bytes"] for name, entry in manifest["files"].items() if name.endswith(".onnx")}


def variant_bytes(manifest: dict[str, Any], variant: str) -> int:
    """Bytes a phone needs for one variant: its graphs, the tokenizer and the runner."""
    files = {*manifest["variants"][variant]["files"].values(), "tokenizer/tokenizer.json", "runner.py"}
    return sum(manifest["files"][name]["bytes"] for name in files)


def artifact_id(manifest: dict[str, Any]) -> str:
    """Hash of what runs: the graphs, tokenizer and runner files, and the constants of the loop."""
    parts = {key: manifest[key] for key in ("schema_version", "shapes", "sampler", "prompts", "vision", "variants", "encoder")}
    parts["files"] = {name: entry["sha256"] for name, entry in manifest["files"].items() if not name.startswith("samples/")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def save_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json with sorted keys."""
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
