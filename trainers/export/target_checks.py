"""Checks of a bundle's further targets: programs are loaded and run, packages are read, and what cannot be checked is named.
Nothing heavy is imported before a target's extra is known to be installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainers.export.runner import Runner
from trainers.export.verify import Check

PACKAGES = {"coreml": ("coremltools",), "executorch": ("executorch", "torchao")}
"""Packages of each target's extra, which has the target's name."""


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
                self.programs[graph] = Program(Path(bundle) / entry["file"], entry["order"])
        self.files = {graph: section["files"][f"{graph}_{form if graph == 'unet' else 'fp32'}"]["file"] for graph in self.programs}

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


def check_targets(bundle: Path, manifest: dict[str, Any]) -> Iterator[Check]:
    """What can be said of each further target without running it; a target without its extra is 'not checked' beyond its hashes.

    Take it after the hashes are known to be right, for it loads the files.
    """
    for target, section in sorted(manifest.get("targets", {}).items()):
        if target not in PACKAGES:
            known = ", ".join(sorted(PACKAGES))
            yield Check(target, "target", problem=f"{bundle / 'manifest.json'} has a target '{target}', known are {known}.")
            continue
        missing = missing_packages(target)
        if missing:
            yield Check(target, "hashes only", f"{' and '.join(missing)} cannot be imported; {_installation(target)}", checked=False)
        for name, entry in sorted(section["files"].items()):
            if not any(file == entry["file"] or file.startswith(entry["file"] + "/") for file in manifest["files"]):
                problem = f"{bundle / 'manifest.json'} gives {target} {name} as {entry['file']}, which is none of its files."
                yield Check(f"{target} {name}", "declared", entry["file"], problem=problem)
            elif not missing:
                yield (_check_program if target == "executorch" else _check_package)(bundle, f"{target} {name}", entry)


def program_runners(bundle: Path, manifest: dict[str, Any], threads: int) -> Iterator[tuple[str, ProgramRunner]]:
    """The loop on the bundle's ExecuTorch programs, by form of the UNet; nothing where there are none or the extra is missing."""
    section = manifest.get("targets", {}).get("executorch")
    if section is not None and not missing_packages("executorch"):
        for form in section["parity"]:
            yield form, ProgramRunner(bundle, section, form, threads)


def _check_program(bundle: Path, name: str, entry: dict[str, Any]) -> Check:
    from trainers.export.executorch import Program

    try:
        found = Program(bundle / entry["file"], entry["order"]).shapes
    except ValueError as error:
        return Check(name, "inputs", problem=str(error))
    wrong = f"{bundle / entry['file']} takes {found}, the manifest says {entry['inputs']}."
    return Check(name, "inputs", ", ".join(found), problem="" if found == entry["inputs"] else wrong)


def _check_package(bundle: Path, name: str, entry: dict[str, Any]) -> Check:
    from trainers.export.coreml import check_package

    try:
        found = check_package(bundle / entry["file"], {side: entry[side] for side in ("inputs", "outputs")})
    except ValueError as error:
        return Check(name, "ports, operators", problem=str(error))
    wrong = f"{bundle / entry['file']} has operators {found}, the manifest says {entry['operators']}."
    return Check(name, "ports, operators", "not run: needs an Apple system", problem="" if found == entry["operators"] else wrong)


def _installation(target: str) -> str:
    return f"pip install -c infra/constraints.txt -e '.[{target}]'"
