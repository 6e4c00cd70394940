"""Checks of a bundle's further targets: programs run beside its ONNX graphs, packages are read; what cannot be is named.
Nothing heavy is imported before a target's extra is known to be installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainers.export.runner import Runner

PACKAGES = {"coreml": ("coremltools",), "executorch": ("executorch", "torchao")}
"""Packages of each target's extra, which has the target's name."""

FLOAT_TOLERANCE = 1e-3
"""Largest difference of a float program from the ONNX graph on the probe; float noise is a hundredth of it."""

INT8_TOLERANCE_DB = 3.0
"""How far int8 latents may fall below the PSNR of the export, for other processors round other values the other way."""

PROBE = "a red circle"


class ProgramRunner(Runner):
    """The bundle's own loop with ExecuTorch programs in place of its ONNX graphs; needs torch, unlike its base."""

    def __init__(self, bundle: Path, section: dict[str, Any], form: str, threads: int = 1) -> None:
        """section: the manifest's about executorch; form: of the UNet, 'fp32' or 'int8' (the other parts are fp32)."""
        from trainers.export.executorch import Program

        super().__init__(bundle, "fp32", threads)
        self.programs = {}
        for name, entry in section["files"].items():
            graph, _, stored = name.rpartition("_")
            if stored == (form if graph == "unet" else "fp32"):
                program = Program(Path(bundle) / entry["file"], list(entry["inputs"]))
                if program.shapes != entry["inputs"]:
                    raise ValueError(f"{Path(bundle) / entry['file']} takes {program.shapes}, the manifest says {entry['inputs']}.")
                self.programs[graph] = program

    def run_graph(self, graph: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Output of one part for the inputs that the manifest lists, row by row."""
        return self.programs[graph](inputs)


def missing_packages(target: str) -> list[str]:
    """Packages of `target` that are not installed."""
    return [package for package in PACKAGES.get(target, ()) if importlib.util.find_spec(package) is None]


def require_targets(targets: Sequence[str]) -> None:
    """ValueError naming the extra that a target lacks."""
    for target in targets:
        missing = missing_packages(target)
        if missing:
            raise ValueError(
                f"export.targets asks for '{target}', but {' and '.join(missing)} cannot be imported; "
                f"{_installation(target)}, or take it out of export.targets."
            )


def probe(bundle: Path, section: dict[str, Any], form: str, threads: int = 1) -> dict[str, dict[str, float]]:
    """Differences of each program from the bundle's fp32 ONNX graph on one made-up edit, and of the latents after all steps."""
    from trainers.export.parity import difference

    graphs, programs = Runner(bundle, "fp32", threads), ProgramRunner(bundle, section, form, threads)
    size = graphs.manifest["shapes"]["image"]
    image = np.random.default_rng(0).integers(0, 256, (size["height"], size["width"], 3), dtype=np.uint8)
    noise, condition = graphs.initial_noise([0]), graphs.encode_images([image])
    report = {"vae_encoder": difference(condition, programs.encode_images([image]))}
    if "edit_encoder" in programs.programs:
        states, mask = graphs.encode_edits([image], [PROBE])
        report["edit_encoder"] = difference(states, programs.encode_edits([image], [PROBE])[0])
        report["text_encoder"] = difference(graphs.encode_prompts([PROBE])[0], programs.encode_prompts([PROBE])[0])
    else:
        width = graphs.manifest["encoder"]["width"]
        states = np.random.default_rng(1).standard_normal((1, graphs.sequence_tokens, width), np.float32)
        mask = np.ones(states.shape[:2], np.int64)
    latents = graphs.denoise(noise, condition, states, mask)
    report["latents"] = difference(latents, programs.denoise(noise, condition, states, mask))
    picture = graphs.run_graph("vae_decoder", {"latent": latents})
    report["vae_decoder"] = difference(picture, programs.run_graph("vae_decoder", {"latent": latents}))
    return report


def check_targets(bundle: Path, manifest: dict[str, Any], threads: int = 1) -> list[dict[str, str]]:
    """One row a target: {'target', 'verdict': 'ok' | 'not checked', 'detail'}; ValueError names the file that is wrong.

    Call it after the hashes are known to be right, for it loads the files.
    """
    rows = []
    for target, section in sorted(manifest.get("targets", {}).items()):
        if target not in PACKAGES:
            raise ValueError(f"{bundle / 'manifest.json'} has a target '{target}', known are {', '.join(sorted(PACKAGES))}.")
        for name, entry in section["files"].items():
            if not any(file == entry["file"] or file.startswith(entry["file"] + "/") for file in manifest["files"]):
                raise ValueError(f"{bundle / 'manifest.json'} gives {target} {name} as {entry['file']}, which is none of its files.")
        missing = missing_packages(target)
        if missing:
            row = ("not checked", f"hashes only: {' and '.join(missing)} cannot be imported; {_installation(target)}")
        else:
            row = ("ok", (_check_programs if target == "executorch" else _check_packages)(bundle, section, threads))
        rows.append({"target": target, "verdict": row[0], "detail": row[1]})
    return rows


def _check_programs(bundle: Path, section: dict[str, Any], threads: int) -> str:
    said = []
    for form, recorded in section["probe"].items():
        found = probe(bundle, section, form, threads)
        for part, value in found.items():
            if part == "latents" and form == "int8":
                if not value["psnr_db"] >= recorded[part]["psnr_db"] - INT8_TOLERANCE_DB:
                    raise ValueError(
                        f"{bundle / 'executorch'}: int8 latents are {value['psnr_db']} dB from the ONNX graphs', "
                        f"at export they were {recorded[part]['psnr_db']} dB; this machine's ExecuTorch does not compute the same."
                    )
            elif not value["max_abs"] <= FLOAT_TOLERANCE:
                raise ValueError(
                    f"{bundle / 'executorch'}: {part} ({form}) is {value['max_abs']:.2e} from the ONNX graph, allowed is {FLOAT_TOLERANCE:.0e}."
                )
        said.append(f"{form} latents {found['latents']['psnr_db']} dB from the ONNX graphs'")
    return f"{len(section['files'])} programs run: " + ", ".join(said)


def _check_packages(bundle: Path, section: dict[str, Any], threads: int) -> str:
    from trainers.export.coreml import check_package

    for entry in section["files"].values():
        found = check_package(bundle / entry["file"], {side: entry[side] for side in ("inputs", "outputs")})
        if found != entry["operators"]:
            raise ValueError(f"{bundle / entry['file']} has operators {found}, the manifest says {entry['operators']}.")
    return f"{len(section['files'])} packages read, ports and operators as listed; not run: {section['runtime_note']}"


def _installation(target: str) -> str:
    return f"pip install -c infra/constraints.txt -e '.[{target}]'"
