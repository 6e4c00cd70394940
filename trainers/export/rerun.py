"""Runs every variant of a bundle on its samples again: how far from torch, how long and how much memory; needs no torch.
The second half of `dreamlite verify`: a bundle can be whole and still be computed wrongly by this machine's runtime."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainers.export.runner import Runner
from trainers.export.samples import Samples, compare, load_samples
from trainers.export.target_checks import check_targets, program_runners
from trainers.export.verify import Check, check_bundle, read_manifest

LOSS_DB = 3.0
"""A variant may come out this much below the PSNR that the export measured: other CPUs round other 8-bit values."""

PLACES = {"graphs": "graphs", "latents": "end_to_end", "images": "images"}
"""Where the manifest's parity keeps each kind of comparison."""

KINDS = {"graphs": "graph", "latents": "latents after all steps", "images": "images"}


def inspect_bundle(bundle: Path, threads: int = 1) -> list[Check]:
    """Every check of a bundle: hashes, shapes, sigmas, then parity of each graph and end to end, seconds and peak memory.

    Graphs of a bundle that does not hold together are not run. ValueError where it has no manifest.
    """
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    checks = list(check_bundle(bundle, manifest))
    if not all(check.ok for check in checks):
        return checks
    samples = load_samples(bundle)
    for variant in manifest["variants"]:
        recorded = {
            kind: {name.removesuffix(f"_{variant}"): value for name, value in manifest["parity"][place].items() if name.endswith(f"_{variant}")}
            for kind, place in PLACES.items()
        }
        checks += _parity(bundle, manifest, variant, Runner(bundle, variant, threads), samples, recorded)
        checks += _costs(bundle, variant, samples, threads)
    targets = list(check_targets(bundle, manifest))
    checks += targets
    if all(check.ok for check in targets):
        for form, runner in program_runners(bundle, manifest, threads):
            recorded = manifest["targets"]["executorch"]["parity"][form]
            checks += _parity(bundle, manifest, f"executorch_{form}", runner, samples, recorded)
    return checks


def _parity(
    bundle: Path, manifest: dict[str, Any], variant: str, runner: Runner, samples: list[Samples], recorded: dict[str, Any]
) -> Iterator[Check]:
    for kind, found in compare(runner, samples).items():
        for name, value in found.items():
            if variant.endswith("fp32") and kind != "images":
                limit, good = manifest["settings"]["max_abs_error"], value["max_abs"] <= manifest["settings"]["max_abs_error"]
                shown, allowed = f"{value['max_abs']:.1e}", f"<= {limit:.0e}"
            else:
                limit = recorded[kind][name]["psnr_db"] - LOSS_DB
                good, shown, allowed = value["psnr_db"] >= limit, f"{value['psnr_db']:.1f} dB", f">= {limit:.1f} dB"
            problem = (
                f"{bundle}: {KINDS[kind]} of {name} in {variant} comes out {shown} from torch's, allowed is {allowed}; "
                "this machine's runtime does not compute what the export measured."
            )
            yield Check(f"{name} {variant}", KINDS[kind], shown, allowed, "" if good else problem)


def _costs(bundle: Path, variant: str, samples: list[Samples], threads: int) -> Iterator[Check]:
    """Seconds of one call with one image, and how much more memory the process takes while it loads and runs the part, per part."""
    for part, call in _calls(bundle, variant, samples, threads).items():
        before = memory_mb("VmRSS") if reset_peak() else None
        runner = Runner(bundle, variant, threads)
        call(runner)
        best = min(_timed(lambda call=call, runner=runner: call(runner)) for _ in range(3))
        yield Check(f"{part} {variant}", "seconds", f"{best:.4f}")
        if before is not None:
            yield Check(f"{part} {variant}", "peak memory", f"+{max(memory_mb('VmHWM') - before, 0):.0f} MB")


def _calls(bundle: Path, variant: str, samples: list[Samples], threads: int) -> dict[str, Callable[[Runner], Any]]:
    calls: dict[str, Callable[[Runner], Any]] = {}
    files = Runner(bundle, variant, threads).files
    for group in samples:
        if group.task == "generate" and "text_encoder" in files:
            calls["text_encoder"] = lambda runner, group=group: runner.encode_prompts(group.texts[:1])
        if group.task == "edit":
            calls["vae_encoder"] = lambda runner, group=group: runner.encode_images(group.sources[:1])
            if "edit_encoder" in files:
                calls["edit_encoder"] = lambda runner, group=group: runner.encode_edits(group.sources[:1], group.texts[:1])
        first = {name: group.arrays[name][:1] for name in ("noise", "condition", "hidden_states", "mask")}
        calls["unet, all steps"] = lambda runner, first=first: runner.denoise(*first.values())
        calls["vae_decoder"] = lambda runner, group=group: runner.decode(group.arrays["latents"][:1])
    return calls


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def reset_peak() -> bool:
    """Start this process's memory peak anew; False where the system has no such switch (it is Linux's)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def memory_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process on Linux."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) / 1024 if match else 0.0
