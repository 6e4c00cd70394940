"""From a distilled checkpoint to one directory a phone team can take: graphs, tokenizer, manifest, samples, runner.
Everything that must agree with training (prompts, drop lengths, sigmas, hidden state) is in its manifest, hashed."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainers.export.graphs import UNET_INPUTS, UNetGraph, VaeDecoderGraph, VaeEncoderGraph, write_graph
from trainers.export.parity import TorchReference, difference, kept
from trainers.export.quantize import SESSION_OPTIONS, Feed, cpu_flags, quantize_unet
from trainers.export.rows import Row, Split, read_rows, split_rows
from trainers.export.runner import MAX_BATCH, SCHEMA_VERSION, Runner
from trainers.export.settings import ExportSettings
from trainers.export.source import Source, directory_digest, read_source
from trainers.export.text_graphs import EditEncoderGraph, EditLayout, TextEncoderGraph
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
    torch.set_num_threads(max(1, settings.threads))
    source = read_source(Path(checkpoint))
    rows = split_rows(read_rows(calibration, settings.seed), settings.calibration_rows, settings.parity_rows)
    if not rows.parity:
        raise ValueError("export needs calibration rows, also to measure parity; pass calibration=[{task, text, image}].")
    output = Path(output)
    draft, final = output / "bundle.draft", output / "bundle"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)

    reference = TorchReference(source, settings.steps)
    _write_graphs(source, reference, settings, draft)
    _copy_side_files(source, settings, rows, draft)
    manifest = _manifest(source, reference, settings, lineage or {}, draft)
    _save_manifest(draft, manifest)
    graphs_done = time.perf_counter()

    runner = Runner(draft, "fp32", settings.threads)
    hidden = _Embedder(reference, runner, settings)
    if settings.quantize:
        feeds = _trajectory(runner, hidden, rows.calibration)
        record = quantize_unet(draft / "unet.onnx", draft / "unet_int8.onnx", feeds, settings)
        record["calibration"] |= {"rows": len(rows.calibration), "disjoint_from_parity": rows.disjoint}
        manifest["quantization"] = record
        manifest["variants"]["int8"] = {"unet": "unet_int8.onnx", "session_options": SESSION_OPTIONS}
        _save_manifest(draft, manifest)
    quantize_done = time.perf_counter()

    manifest["parity"], seconds = _measure(draft, source, reference, hidden, rows, settings, manifest)
    _gate(manifest["parity"], settings)
    manifest["files"] = _file_table(draft)
    manifest["sizes"] = _sizes(manifest)
    manifest["artifact_id"] = _artifact_id(manifest)
    _save_manifest(draft, manifest)
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
        "seconds": {
            "graphs": round(graphs_done - started, 2),
            "quantize": round(quantize_done - graphs_done, 2),
            "total": round(time.perf_counter() - started, 2),
            **seconds,
        },
    }


def _write_graphs(source: Source, reference: TorchReference, settings: ExportSettings, folder: Path) -> None:
    """All ONNX files; example inputs have batch 2, for a batch of 1 would be taken as a constant."""
    side, channels, length = source.latent_px, source.latent_channels, settings.sequence_tokens
    unet_inputs = (
        torch.zeros(2, channels, side, 2 * side),
        torch.full((2,), 500.0),
        torch.zeros(2, length, source.text_width),
        torch.ones(2, length, dtype=torch.int64),
        torch.full((2, 2), float(source.size_px)),
    )
    write_graph(UNetGraph(reference.unet), dict(zip(UNET_INPUTS, unet_inputs, strict=True)), "velocity", folder / "unet.onnx")
    image, latent = torch.zeros(2, 3, source.size_px, source.size_px), torch.zeros(2, channels, side, side)
    write_graph(VaeEncoderGraph(reference.vae), {"image": image}, "latent", folder / "vae_encoder.onnx")
    write_graph(VaeDecoderGraph(reference.vae), {"latent": latent}, "image", folder / "vae_decoder.onnx")
    if not settings.text_encoder:
        return
    encoder = reference.encoder.text_encoder
    ids, mask = _token_rows(reference, source.prompts()["generate_template"], source.drop_generate + length)
    graph = TextEncoderGraph(encoder, source.hidden_state)
    write_graph(graph, {"input_ids": ids, "attention_mask": mask}, "hidden_states", folder / "text_encoder.onnx")
    prompts, vision = source.prompts(), source.vision
    template = prompts["edit_template"].replace(prompts["image_token"], prompts["image_token"] * vision.tokens)
    ids, mask = _token_rows(reference, template, source.drop_edit + length)
    places = (ids[0] == encoder.config.image_token_id).nonzero().flatten()
    layout = EditLayout(int(places[0]), vision.tokens, vision.grid)
    graph = EditEncoderGraph(encoder, source.hidden_state, layout, ids[:1], list(vision.mean), list(vision.std))
    pixels = torch.zeros(2, 3, *vision.grid_px)
    inputs = {"pixels": pixels, "input_ids": ids, "attention_mask": mask}
    write_graph(graph, inputs, "hidden_states", folder / "edit_encoder.onnx")


def _token_rows(reference: TorchReference, template: str, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = reference.encoder.tokenizer([template.replace("{}", "")] * 2, return_tensors="pt")["input_ids"]
    if tokens.shape[1] > length:
        raise ValueError(
            f"the empty prompt alone has {tokens.shape[1]} tokens, the graph holds {length}; raise export.sequence_tokens."
        )
    pad = length - tokens.shape[1]
    ids = torch.nn.functional.pad(tokens, (0, pad), value=reference.encoder.tokenizer.pad_token_id)
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (0, pad))
    return ids, mask


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


def _manifest(
    source: Source, reference: TorchReference, settings: ExportSettings, lineage: dict[str, Any], folder: Path
) -> dict[str, Any]:
    side, vision = source.latent_px, source.vision
    graphs = {name: f"{name}.onnx" for name in ("unet", "vae_encoder", "vae_decoder", "text_encoder", "edit_encoder")}
    return {
        "schema_version": SCHEMA_VERSION,
        "artifact_id": "",
        "checkpoint_digest": source.digest,
        "lineage": lineage,
        "settings": settings.model_dump(mode="json"),
        "graphs": {name: _graph_entry(folder / file) for name, file in graphs.items() if (folder / file).is_file()},
        "variants": {"fp32": {"unet": "unet.onnx", "session_options": {}}},
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
            "pad_token_id": reference.encoder.tokenizer.pad_token_id,
            "digest": directory_digest(source.directory / "text_encoder"),
            "exported": settings.text_encoder,
        },
        "vision": {
            "resize_px": vision.resize_px,
            "grid_px": list(vision.grid_px),
            "tokens": vision.tokens,
            "mean": list(vision.mean),
            "std": list(vision.std),
        },
        "quantization": None,
        "licences": {
            "code": "Apache-2.0",
            "weights": settings.weights_licence,
            "derived_from_release": settings.derived_from_release,
            "non_commercial": "-NC-" in settings.weights_licence,
        },
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "numpy")},
        "machine": {"architecture": platform.machine(), "cpu_flags": cpu_flags()},
    }


def _graph_entry(path: Path) -> dict[str, Any]:
    """Name, inputs and output of one graph file; the free batch axis is written 'batch'."""
    import onnx

    model = onnx.load(path, load_external_data=False)

    def ports(values: Sequence[Any]) -> dict[str, Any]:
        kinds = onnx.TensorProto.DataType
        return {
            value.name: {
                "dtype": kinds.Name(value.type.tensor_type.elem_type).lower(),
                "shape": [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim],
            }
            for value in values
        }

    return {"file": path.name, "inputs": ports(model.graph.input), "outputs": ports(model.graph.output)}


class _Embedder:
    """Hidden states of rows in the bundle's fixed length: by its own graphs, or by torch where the encoder stays out."""

    def __init__(self, reference: TorchReference, runner: Runner, settings: ExportSettings) -> None:
        self.reference, self.runner, self.settings = reference, runner, settings

    def __call__(self, rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
        task, texts = rows[0].task, [row.text for row in rows]
        if self.settings.text_encoder:
            if task == "generate":
                return self.runner.encode_prompts(texts)
            return self.runner.encode_edits([row.image for row in rows], texts)
        embeddings = self.reference.embed([{"text": row.text, "image": row.image} for row in rows], task)
        room = self.settings.sequence_tokens
        states = np.zeros((len(rows), room, embeddings.states.shape[2]), np.float32)
        mask = np.zeros((len(rows), room), np.int64)
        width = min(room, embeddings.states.shape[1])
        states[:, :width], mask[:, :width] = embeddings.states[:, :width], embeddings.mask[:, :width]
        return states, mask


def _condition(runner: Runner, rows: list[Row], noise: np.ndarray) -> np.ndarray:
    return np.zeros_like(noise) if rows[0].task == "generate" else runner.encode_images([row.image for row in rows])


def _by_task(rows: Sequence[Row]) -> list[list[Row]]:
    groups = [[row for row in rows if row.task == task] for task in ("generate", "edit")]
    return [group for group in groups if group]


def _trajectory(runner: Runner, hidden: _Embedder, rows: Sequence[Row]) -> list[Feed]:
    """Inputs of every UNet call while the float student runs the rows: its own states at all deployed sigmas."""
    feeds: list[Feed] = []
    for group in _by_task(rows):
        for start in range(0, len(group), 8):
            part = group[start : start + 8]
            noise = runner.initial_noise([row.seed for row in part])
            states, mask = hidden(part)
            runner.denoise(noise, _condition(runner, part, noise), states, mask, lambda _index, feed: feeds.append(feed))
    return feeds


def _measure(
    folder: Path,
    source: Source,
    reference: TorchReference,
    hidden: _Embedder,
    rows: Split,
    settings: ExportSettings,
    manifest: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, float]]:
    """Parity per graph and end to end, both variants; writes samples/ on the way. Also seconds per image."""
    runner = hidden.runner
    variants = {name: runner if name == "fp32" else Runner(folder, name, settings.threads) for name in manifest["variants"]}
    graphs: dict[str, Any] = {}
    end_to_end: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    (folder / "samples").mkdir()
    records = []
    for group in _by_task(rows.parity):
        task = group[0].task
        noise = runner.initial_noise([row.seed for row in group])
        embeddings = reference.embed([{"text": row.text, "image": row.image} for row in group], task)
        states, mask = hidden(group)
        if settings.text_encoder:
            name = "text_encoder" if task == "generate" else "edit_encoder"
            graphs[name] = difference(kept(embeddings.states.numpy(), embeddings.mask.numpy()), kept(states, mask))
        condition = np.zeros_like(noise)
        if task == "edit":
            condition = runner.encode_images([row.image for row in group])
            square = (source.size_px, source.size_px)
            resized = [Image.fromarray(row.image).resize(square, Image.Resampling.LANCZOS) for row in group]
            pixels = np.stack([np.asarray(image, np.float32) for image in resized]).transpose(0, 3, 1, 2) / 127.5 - 1
            graphs["vae_encoder"] = difference(reference.encode_image(pixels), condition)
        expected = reference.denoise(noise, condition, embeddings)
        feeds: list[Feed] = []
        for name, candidate in variants.items():
            began = time.perf_counter()
            hook = (lambda _index, feed: feeds.append(feed)) if name == "fp32" else None
            latents = candidate.denoise(noise, condition, states, mask, hook)
            seconds[f"{task}_{name}_per_image"] = round((time.perf_counter() - began) / len(group), 4)
            end_to_end[f"{task}_{name}"] = difference(expected, latents)
            pictures = candidate.decode(latents)
            np.savez(folder / "samples" / f"{task}_{name}.npz", latents=latents, images=pictures)
            for index, picture in enumerate(pictures):
                Image.fromarray(picture).save(folder / "samples" / f"{task}_{index}_{name}.png")
        truth = [reference.velocity(feed) for feed in feeds]
        for name, candidate in variants.items():
            calls = [candidate._run("unet", feed) for feed in feeds]
            graphs[f"unet_{name}_{task}"] = difference(np.stack(truth), np.stack(calls))
        graphs["vae_decoder"] = difference(
            reference.decode(expected), runner._chunked("vae_decoder", {"latent": expected.astype(np.float32)})
        )
        for index, row in enumerate(group):
            record = {"task": task, "index": index, "text": row.text, "seed": row.seed, "source": None}
            if row.image is not None:
                record["source"] = f"{task}_{index}_source.png"
                Image.fromarray(row.image).save(folder / "samples" / record["source"])
            records.append(record)
    (folder / "samples" / "samples.json").write_text(json.dumps(records, indent=2))
    note = "max_abs and psnr_db against torch fp32; end_to_end: latents after all steps from the same noise"
    return {"note": note, "rows": len(rows.parity), "graphs": graphs, "end_to_end": end_to_end}, seconds


def _gate(parity: dict[str, Any], settings: ExportSettings) -> None:
    """Stop on a float graph that does not compute what torch computes; int8 loss is reported, and gated by the flow."""
    floats = {name: value for name, value in (parity["graphs"] | parity["end_to_end"]).items() if "int8" not in name}
    for name, value in floats.items():
        if not value["max_abs"] <= settings.max_abs_error:
            raise ValueError(
                f"exported {name} differs from torch by {value['max_abs']:.2e}, allowed is {settings.max_abs_error:.0e} "
                "(export.max_abs_error); the graph is wrong, or its values are so large that the limit must be raised."
            )


def _file_table(folder: Path) -> dict[str, dict[str, Any]]:
    table = {}
    for path in sorted(item for item in folder.rglob("*") if item.is_file() and item.name != "manifest.json"):
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        table[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return table


def _sizes(manifest: dict[str, Any]) -> dict[str, int]:
    return {name: entry["bytes"] for name, entry in manifest["files"].items() if name.endswith(".onnx")}


def _artifact_id(manifest: dict[str, Any]) -> str:
    """Hash of what runs: the graphs, tokenizer and runner files, and the constants of the loop."""
    parts = {key: manifest[key] for key in ("schema_version", "shapes", "sampler", "prompts", "vision", "variants", "encoder")}
    parts["files"] = {name: entry["sha256"] for name, entry in manifest["files"].items() if not name.startswith("samples/")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _save_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
