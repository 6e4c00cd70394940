"""From a distilled checkpoint to one directory a phone team can take: graphs, tokenizer, manifest, samples, runner.
Everything that must agree with training (prompts, drop lengths, sigmas, hidden state) is in its manifest, hashed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trainers.export.encoder_weights import FOLDER as ENCODER_FOLDER
from trainers.export.encoder_weights import write_encoder
from trainers.export.loop_page import describe_loop
from trainers.export.manifest import artifact_id, draft_manifest, file_table, graph_sizes, save_manifest, variant_bytes
from trainers.export.manifest_schema import manifest_schema
from trainers.export.measure import Embedder, check_float_graphs, make_samples, measure, measure_encoder, trajectory
from trainers.export.parity import TorchReference
from trainers.export.parts import write_graphs
from trainers.export.rows import Split, read_rows, split_rows, write_calibration
from trainers.export.runner import Runner
from trainers.export.samples import save_samples
from trainers.export.settings import ExportSettings
from trainers.export.source import Source, directory_digest, read_source
from trainers.export.target_checks import require_targets
from trainers.export.targets import write_targets
from trainers.export.variants import float_files, write_variants
from trainers.export.verify import verify_bundle

README = """# DreamLite bundle

Text to image and instruction edits in {steps} UNet calls. `manifest.json` holds every constant, `LOOP.md` tells the loop
to whoever ports it, `samples/` holds inputs and what must come out, and `runner.py` is the reference, which needs only
numpy, onnxruntime, tokenizers and Pillow:

    from runner import Runner
    pictures = Runner(".", variant="{variant}").generate(["{prompt}"], seeds=[0]{states})

`dreamlite verify <this folder>` checks it. Weights: {licence}. Code: Apache-2.0.
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

    calibration: dicts with task ('generate' | 'edit'), text, image (edits: the source), and the id that is recorded; from
    training data, never from evaluation prompts. lineage: ids and digests of what the checkpoint came from, copied into the manifest as given.
    Raises ValueError when the checkpoint is incomplete or a float graph is not equal to torch.
    """
    started = time.perf_counter()
    require_targets(settings.targets)
    torch.set_num_threads(max(1, settings.threads))
    source = read_source(Path(checkpoint), settings.steps)
    settings = settings.carrying(source.weights)
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
    manifest["variants"] = {"fp32": float_files(settings)}
    save_manifest(draft, manifest)
    graphs_done = time.perf_counter()

    runner = Runner(draft, "fp32", settings.threads)
    hidden = Embedder(reference, runner, settings)
    feeds = trajectory(runner, hidden, rows.calibration) if {"int8", "int4"} & set(settings.variants) else []
    manifest["variants"], manifest["quantization"] = write_variants(draft, feeds, settings)
    if "int8" in settings.variants:
        about = {"rows": len(rows.calibration), "disjoint_from_parity": rows.disjoint}
        manifest["quantization"]["unet_int8"]["calibration"] |= about
    write_calibration(draft, rows, manifest["sampler"]["sigmas"], bool(feeds))
    save_manifest(draft, manifest)
    variants_done = time.perf_counter()

    samples = make_samples(reference, hidden, rows.parity)
    save_samples(draft, samples)
    manifest["parity"], seconds = measure(draft, list(manifest["variants"]), settings.threads)
    check_float_graphs(manifest["parity"], settings)
    manifest["targets"] = write_targets(draft, source, reference, settings, feeds, manifest["quantization"])
    if settings.encoder_bits and not settings.text_encoder:
        folder = draft / ENCODER_FOLDER
        record = write_encoder(source.directory, folder, settings.encoder_bits, settings.encoder_block_values)
        manifest["encoder"]["weights"] = record | measure_encoder(reference, samples, rows.parity, folder, settings.encoder_bits)
    (draft / "LOOP.md").write_text(describe_loop(manifest))
    (draft / "manifest.schema.json").write_text(manifest_schema())
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
        "variants": {name: variant_bytes(manifest, name) for name in manifest["variants"]},
        "parity": manifest["parity"],
        "quantization": manifest["quantization"],
        "encoder": manifest["encoder"].get("weights"),
        "targets": manifest["targets"],
        "seconds": {
            "graphs": round(graphs_done - started, 2),
            "variants": round(variants_done - graphs_done, 2),
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
    variant = "int8" if "int8" in settings.variants else settings.variants[-1]
    states = "" if settings.text_encoder else ", hidden_states=(states, mask)"  # of an encoder that runs elsewhere
    text = README.format(steps=settings.steps, variant=variant, prompt=prompt, states=states, licence=settings.weights_licence)
    (folder / "README.md").write_text(text)


