"""From a distilled checkpoint to one directory a phone team can take: graphs, tokenizer, manifest, samples, runner.
Everything that must agree with training (prompts, drop lengths, sigmas, hidden state) is in its manifest, hashed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trainers.export.manifest import artifact_id, draft_manifest, file_table, graph_sizes, save_manifest
from trainers.export.measure import Embedder, check_float_graphs, measure, trajectory
from trainers.export.parity import TorchReference
from trainers.export.parts import write_graphs
from trainers.export.quantize import SESSION_OPTIONS, quantize_unet
from trainers.export.rows import Split, read_rows, split_rows
from trainers.export.runner import Runner
from trainers.export.settings import ExportSettings
from trainers.export.source import Source, directory_digest, read_source
from trainers.export.target_checks import require_targets
from trainers.export.targets import write_targets
from trainers.export.verify import verify_bundle

README = """# DreamLite bundle

Text to image and instruction edits in {steps} UNet calls. `manifest.json` holds every constant; `runner.py` is the
reference loop and needs only numpy, onnxruntime, tokenizers and Pillow:

    from runner import Runner
    pictures = Runner(".", variant="{variant}").generate(["{prompt}"], seeds=[0])

Weights: {licence}. Code: Apache-2.0.
"""


def export_bundle(
    checkpoint: Path,
    settings: ExportSettings,
    output: Path,
    *,
    calibration: Sequence[dict[str, Any]],
    lineage: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `output`/bundle from a mobile checkpoint and return its numbers.

    calibration: dicts with task ('generate' | 'edit'), text, image (edits: the source); from training data, never from
    evaluation prompts. lineage: ids and digests of what the checkpoint came from, copied into the manifest as given.
    Raises ValueError when the checkpoint is incomplete or a float graph is not equal to torch.
    """
    started = time.perf_counter()
    require_targets(settings.targets)
    torch.set_num_threads(max(1, settings.threads))
    source = read_source(Path(checkpoint), settings.steps)
    rows = split_rows(read_rows(calibration, settings.seed), settings.calibration_rows, settings.parity_rows)
    if not rows.parity:
        raise ValueError("export needs calibration rows, also to measure parity; pass calibration=[{task, text, image}].")
    output = Path(output)
    draft, final = output / "bundle.draft", output / "bundle"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)

    reference = TorchReference(source, settings.steps)
    write_graphs(source, reference, settings, draft)
    _copy_side_files(source, settings, rows, draft)
    manifest = draft_manifest(source, reference.encoder.tokenizer.pad_token_id, settings, lineage or {}, draft)
    save_manifest(draft, manifest)
    graphs_done = time.perf_counter()

    runner = Runner(draft, "fp32", settings.threads)
    hidden = Embedder(reference, runner, settings)
    if settings.quantize:
        feeds = trajectory(runner, hidden, rows.calibration)
        record = quantize_unet(draft / "unet.onnx", draft / "unet_int8.onnx", feeds, settings)
        record["calibration"] |= {"rows": len(rows.calibration), "disjoint_from_parity": rows.disjoint}
        manifest["quantization"] = record
        manifest["variants"]["int8"] = {"unet": "unet_int8.onnx", "session_options": SESSION_OPTIONS}
        save_manifest(draft, manifest)
    quantize_done = time.perf_counter()

    manifest["parity"], seconds = measure(draft, reference, hidden, rows.parity, settings, list(manifest["variants"]))
    check_float_graphs(manifest["parity"], settings)
    targets = write_targets(draft, source, reference, hidden, rows.calibration, rows.parity)
    if targets:
        manifest["targets"] = targets
    manifest["files"] = file_table(draft)
    manifest["sizes"] = graph_sizes(manifest)
    manifest["artifact_id"] = artifact_id(manifest)
    save_manifest(draft, manifest)
    verify_bundle(draft)
    shutil.rmtree(final, ignore_errors=True)
    draft.rename(final)
    return {
        "bundle": str(final),
        "artifact_id": manifest["artifact_id"],
        "digest": directory_digest(final),
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "sizes": manifest["sizes"],
        "parity": manifest["parity"],
        "quantization": manifest["quantization"],
        "targets": targets,
        "seconds": {
            "graphs": round(graphs_done - started, 2),
            "quantize": round(quantize_done - graphs_done, 2),
            "total": round(time.perf_counter() - started, 2),
            **seconds,
        },
    }


def _copy_side_files(source: Source, settings: ExportSettings, rows: Split, folder: Path) -> None:
    tokenizer = source.directory / "tokenizer" / "tokenizer.json"
    if not tokenizer.is_file():
        raise ValueError(f"{tokenizer} is missing; the runner needs a fast tokenizer file.")
    (folder / "tokenizer").mkdir()
    shutil.copyfile(tokenizer, folder / "tokenizer" / "tokenizer.json")
    shutil.copyfile(Path(__file__).with_name("runner.py"), folder / "runner.py")
    prompt = next((row.text for row in rows.parity if row.task == "generate"), "a red circle").replace('"', "'")
    variant = "int8" if settings.quantize else "fp32"
    text = README.format(steps=settings.steps, variant=variant, prompt=prompt, licence=settings.weights_licence)
    (folder / "README.md").write_text(text)


