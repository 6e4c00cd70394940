"""Checks that a bundle is what its manifest says, naming the bad file or constant, without running a graph; needs no torch.
Run at the end of an export, after a copy, and as the first half of `dreamlite verify` (the second is rerun.py)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from trainers.export.manifest_schema import Manifest
from trainers.export.ports import read_ports
from trainers.export.runner import SCHEMA_VERSION
from trainers.export.schedule import deployed_sigmas


@dataclass(frozen=True)
class Check:
    """One thing looked at: `part` is a file, graph or constant; `problem` says in one sentence what is wrong, '' where nothing is."""

    part: str
    what: str
    value: str = ""
    limit: str = ""
    problem: str = ""
    checked: bool = True

    @property
    def ok(self) -> bool:
        return not self.problem

    @property
    def result(self) -> str:
        """'ok', 'FAILED', or 'not checked' where this machine lacks what it takes."""
        return ("ok" if self.ok else "FAILED") if self.checked else "not checked"


def verify_bundle(bundle: Path) -> dict[str, Any]:
    """The manifest of a bundle that holds together; ValueError names the first thing that does not.

    Checks the manifest's fields, every file's sha256, files that nobody declared, graph ports against the manifest's shapes,
    the sigma list against the scheduler constants, and the shapes of an encoder's packed weights.
    """
    manifest = read_manifest(bundle)
    for check in check_bundle(bundle, manifest):
        if not check.ok:
            raise ValueError(check.problem)
    return manifest


def read_manifest(bundle: Path) -> dict[str, Any]:
    """manifest.json of a bundle; ValueError where there is none or its schema is another."""
    path = Path(bundle) / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{bundle} holds no manifest.json; pass the bundle directory.")
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy the whole bundle again.") from None
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema version {manifest.get('schema_version')}, known is {SCHEMA_VERSION}.")
    return manifest


def check_bundle(bundle: Path, manifest: dict[str, Any]) -> Iterator[Check]:
    """Every check that needs no run, in an order in which the first failure is the likeliest cause of the next."""
    bundle = Path(bundle)
    schema = _check_schema(bundle, manifest)
    yield schema
    if not schema.ok:
        return
    yield from _check_files(bundle, manifest)
    yield _check_sigmas(bundle, manifest)
    yield from _check_graphs(bundle, manifest)
    if manifest["encoder"].get("weights"):
        yield _check_encoder(bundle, manifest["encoder"])


def _check_schema(bundle: Path, manifest: dict[str, Any]) -> Check:
    try:
        Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        problem = f"{bundle / 'manifest.json'}: {where}: {first['msg']}; the manifest was edited, or written by another version."
        return Check("manifest.json", "schema", problem=problem)
    return Check("manifest.json", "schema", f"version {SCHEMA_VERSION}")


def _check_files(bundle: Path, manifest: dict[str, Any]) -> Iterator[Check]:
    for name, entry in manifest["files"].items():
        file = bundle / name
        if not file.is_file():
            yield Check(name, "sha256", "missing", entry["sha256"][:12], f"{file} is missing; copy the whole bundle again.")
            continue
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        changed = f"{file} has sha256 {digest[:12]}, the manifest says {entry['sha256'][:12]}; it was changed."
        yield Check(name, "sha256", digest[:12], entry["sha256"][:12], "" if digest == entry["sha256"] else changed)
    known = {*manifest["files"], "manifest.json"}
    for file in sorted(item for item in bundle.rglob("*") if item.is_file()):
        name = file.relative_to(bundle).as_posix()
        if name not in known and "__pycache__" not in name:
            yield Check(name, "declared", "no", "yes", f"{file} is not in the manifest; remove it or export again.")


def _check_sigmas(bundle: Path, manifest: dict[str, Any]) -> Check:
    sampler, latent = manifest["sampler"], manifest["shapes"]["latent"]
    expected = deployed_sigmas(sampler["scheduler"], latent["height"] * latent["width"] // 4, sampler["steps"])
    listed = [round(value, 4) for value in sampler["sigmas"]]
    wanted = [round(value, 4) for value in expected]
    good = len(expected) == len(sampler["sigmas"]) and np.allclose(expected, sampler["sigmas"], rtol=0, atol=1e-6)
    problem = (
        f"{bundle / 'manifest.json'} lists sigmas {listed}, its scheduler gives {wanted}; "
        "the student would run at levels it never saw."
    )
    return Check("manifest.json", "sigmas", f"{len(listed)} levels", f"{len(wanted)} levels", "" if good else problem)


def _check_graphs(bundle: Path, manifest: dict[str, Any]) -> Iterator[Check]:
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
    files = sorted({(part, name) for entry in manifest["variants"].values() for part, name in entry["files"].items()})
    for part, name in files:
        if not (bundle / name).is_file():
            continue  # named above
        try:
            found = read_ports(bundle / name)
        except Exception as error:  # protobuf raises its own kinds on bytes that are no graph
            yield Check(name, "inputs", problem=f"{bundle / name} is not a readable ONNX graph ({type(error).__name__}); copy it again.")
            continue
        problem = ""
        for port, shape in expected[part].items():
            given = found["inputs"].get(port, {}).get("shape", [])[1:]
            if given != shape:
                problem = problem or f"{bundle / name} takes {port} of shape {given}, the manifest says {shape}."
        if not problem and found != manifest["graphs"][part]:
            problem = f"{bundle / name} has ports {found}, the manifest's graphs.{part} says {manifest['graphs'][part]}."
        yield Check(name, "inputs", f"{len(found['inputs'])} of {part}", problem=problem)


def _check_encoder(bundle: Path, encoder: dict[str, Any]) -> Check:
    """Whether each packed matrix has the scales and biases that its own shape asks for, and the config says the same of them."""
    stated, folder = encoder["weights"], bundle / encoder["weights"]["folder"]
    bits, group = stated["bits"], stated["group_values"]
    shapes: dict[str, list[int]] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "numpy") as opened:
                shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118, no mapping
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        return Check(folder.name, "weights", problem=f"{folder} cannot be read ({error}); copy the whole bundle again.")
    stems = [name.removesuffix(".scales") for name in shapes if name.endswith(".scales")]
    limit = f"{stated['layers']} of {bits} bits"
    if len(stems) != stated["layers"] or config.get("quantization") != {"group_size": group, "bits": bits}:
        problem = f"{folder} holds {len(stems)} packed matrices for {config.get('quantization')}, the manifest says {limit} by {group}."
        return Check(folder.name, "weights", f"{len(stems)} packed", limit, problem)
    for stem in stems:
        rows, words = shapes.get(f"{stem}.weight", [0, 0])
        wanted = [rows, words * 32 // bits // group]
        if not shapes[f"{stem}.scales"] == shapes.get(f"{stem}.biases") == wanted:
            problem = f"{folder} has scales of shape {shapes[f'{stem}.scales']} for {stem}, whose weight asks for {wanted}."
            return Check(folder.name, "weights", stem, limit, problem)
    return Check(folder.name, "weights", f"{len(stems)} of {bits} bits", limit)
