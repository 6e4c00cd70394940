"""Checks that a bundle is what its manifest says, naming the bad file or constant; needs no torch.
Run after a copy, before a phone build, and in the nightly evaluation."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from trainers.export.runner import SCHEMA_VERSION, Runner
from trainers.export.schedule import deployed_sigmas
from trainers.export.target_checks import check_targets

SAMPLE_TOLERANCE = {"fp32": 1e-3, "int8": 0.5}
"""Largest allowed difference of latents when samples run again: float noise, and int8 rounding that other CPUs flip."""


def verify_bundle(bundle: Path, *, reproduce: bool = False) -> dict[str, Any]:
    """The manifest of a bundle that holds together; ValueError names the first thing that does not.

    Checks every file's size and sha256, files that nobody declared, graph inputs against the manifest's shapes, and
    the sigma list against the scheduler constants. reproduce: also run the samples and compare the latents, and check
    the further targets (`check_targets`).
    """
    bundle = Path(bundle)
    path = bundle / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{bundle} holds no manifest.json; pass the bundle directory.")
    manifest = json.loads(path.read_text())
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema version {manifest.get('schema_version')}, known is {SCHEMA_VERSION}.")
    _check_files(bundle, manifest)
    _check_sigmas(path, manifest)
    _check_graphs(bundle, manifest)
    if reproduce:
        for variant in manifest["variants"]:
            _check_samples(bundle, manifest, variant)
        check_targets(bundle, manifest)
    return manifest


def _check_files(bundle: Path, manifest: dict[str, Any]) -> None:
    for name, entry in manifest["files"].items():
        file = bundle / name
        if not file.is_file():
            raise ValueError(f"{file} is missing; copy the whole bundle again.")
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != entry["sha256"]:
            raise ValueError(f"{file} has sha256 {digest[:12]}, the manifest says {entry['sha256'][:12]}; it was changed.")
    known = {*manifest["files"], "manifest.json"}
    for file in sorted(item for item in bundle.rglob("*") if item.is_file()):
        name = file.relative_to(bundle).as_posix()
        if name not in known and "__pycache__" not in name:
            raise ValueError(f"{file} is not in the manifest; remove it or export again.")


def _check_sigmas(path: Path, manifest: dict[str, Any]) -> None:
    sampler = manifest["sampler"]
    latent = manifest["shapes"]["latent"]
    expected = deployed_sigmas(sampler["scheduler"], latent["height"] * latent["width"] // 4, sampler["steps"])
    if len(expected) != len(sampler["sigmas"]) or not np.allclose(expected, sampler["sigmas"], rtol=0, atol=1e-6):
        raise ValueError(
            f"{path} lists sigmas {[round(value, 4) for value in sampler['sigmas']]}, its scheduler gives "
            f"{[round(value, 4) for value in expected]}; the student would run at levels it never saw."
        )


def _check_graphs(bundle: Path, manifest: dict[str, Any]) -> None:
    shapes = manifest["shapes"]
    latent, image = shapes["latent"], shapes["image"]
    panel = [latent["channels"], latent["height"], latent["width"]]
    expected = {
        "unet": {
            "sample": [*panel[:2], 2 * panel[2]],
            "encoder_hidden_states": [shapes["sequence_tokens"], manifest["encoder"]["width"]],
        },
        "vae_encoder": {"image": [3, image["height"], image["width"]]},
        "vae_decoder": {"latent": panel},
        "text_encoder": {"input_ids": [manifest["prompts"]["generate_drop_tokens"] + shapes["sequence_tokens"]]},
        "edit_encoder": {"input_ids": [manifest["prompts"]["edit_drop_tokens"] + shapes["sequence_tokens"]]},
    }
    files = {name: [entry["file"]] for name, entry in manifest["graphs"].items()}
    files["unet"] = [variant["unet"] for variant in manifest["variants"].values()]
    for graph, names in files.items():
        for name in names:
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            session = onnxruntime.InferenceSession(str(bundle / name), options, providers=["CPUExecutionProvider"])
            found = {port.name: port.shape[1:] for port in session.get_inputs()}
            for port, shape in expected[graph].items():
                if found.get(port) != shape:
                    raise ValueError(f"{bundle / name} takes {port} of shape {found.get(port)}, the manifest says {shape}.")


def _check_samples(bundle: Path, manifest: dict[str, Any], variant: str) -> None:
    runner = Runner(bundle, variant)
    records = json.loads((bundle / "samples" / "samples.json").read_text())
    for task in ("generate", "edit"):
        mine = [record for record in records if record["task"] == task]
        if not mine or not manifest["encoder"]["exported"]:
            continue
        texts = [record["text"] for record in mine]
        noise = runner.initial_noise([record["seed"] for record in mine])
        if task == "generate":
            condition, (states, mask) = np.zeros_like(noise), runner.encode_prompts(texts)
        else:
            images = [Image.open(bundle / "samples" / record["source"]) for record in mine]
            condition, (states, mask) = runner.encode_images(images), runner.encode_edits(images, texts)
        latents = runner.denoise(noise, condition, states, mask)
        with np.load(bundle / "samples" / f"{task}_{variant}.npz", allow_pickle=False) as stored:
            error = float(np.abs(latents - stored["latents"]).max())
        if not error <= SAMPLE_TOLERANCE[variant]:
            raise ValueError(
                f"{bundle / 'samples'}: {task} with {variant} comes out {error:.3g} away from the stored latents; "
                "this machine's ONNX Runtime does not compute what the export measured."
            )
