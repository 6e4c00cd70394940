"""Runs a fresh bundle beside the torch checkpoint: the calibration trajectory, parity per graph and end to end,
and the samples that a phone port can be checked against."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainers.export.parity import TorchReference, difference, kept
from trainers.export.quantize import Feed
from trainers.export.rows import TASKS, Row
from trainers.export.runner import Runner
from trainers.export.settings import ExportSettings


class Embedder:
    """Hidden states of rows in the bundle's fixed length: by its own graphs, or by torch where the encoder stays out."""

    def __init__(self, reference: TorchReference, runner: Runner, settings: ExportSettings) -> None:
        self.reference, self.runner, self.settings = reference, runner, settings

    def __call__(self, rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
        """States (N, S, C) and mask (N, S) of rows of one task."""
        task, texts = rows[0].task, [row.text for row in rows]
        if self.settings.text_encoder:
            if task == "generate":
                return self.runner.encode_prompts(texts)
            return self.runner.encode_edits([row.image for row in rows], texts)
        embeddings = self.reference.embed(rows)
        room = self.settings.sequence_tokens
        states = np.zeros((len(rows), room, embeddings.states.shape[2]), np.float32)
        mask = np.zeros((len(rows), room), np.int64)
        width = min(room, embeddings.states.shape[1])
        states[:, :width], mask[:, :width] = embeddings.states[:, :width], embeddings.mask[:, :width]
        return states, mask


def _condition(runner: Runner, rows: list[Row], noise: np.ndarray) -> np.ndarray:
    return np.zeros_like(noise) if rows[0].task == "generate" else runner.encode_images([row.image for row in rows])


def _by_task(rows: Sequence[Row]) -> list[list[Row]]:
    groups = [[row for row in rows if row.task == task] for task in TASKS]
    return [group for group in groups if group]


def trajectory(runner: Runner, hidden: Embedder, rows: Sequence[Row]) -> list[Feed]:
    """Inputs of every UNet call while the float student runs the rows: its own states at all deployed sigmas."""
    feeds: list[Feed] = []
    for group in _by_task(rows):
        for start in range(0, len(group), 8):
            part = group[start : start + 8]
            noise = runner.initial_noise([row.seed for row in part])
            states, mask = hidden(part)
            runner.denoise(noise, _condition(runner, part, noise), states, mask, _collector(feeds))
    return feeds


def measure(
    folder: Path, reference: TorchReference, hidden: Embedder, rows: Sequence[Row], settings: ExportSettings, variants: Sequence[str]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Parity report of all variants and seconds per image; writes folder/samples on the way."""
    runners = {name: hidden.runner if name == "fp32" else Runner(folder, name, settings.threads) for name in variants}
    graphs: dict[str, Any] = {}
    end_to_end: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    records: list[dict[str, Any]] = []
    (folder / "samples").mkdir()
    for group in _by_task(rows):
        task = group[0].task
        noise = hidden.runner.initial_noise([row.seed for row in group])
        embeddings = reference.embed(group)
        states, mask = hidden(group)
        condition = _condition(hidden.runner, group, noise)
        if settings.text_encoder:
            name = "text_encoder" if task == "generate" else "edit_encoder"
            graphs[name] = difference(kept(embeddings.states.numpy(), embeddings.mask.numpy()), kept(states, mask))
        if task == "edit":
            graphs["vae_encoder"] = difference(reference.encode_images([row.image for row in group]), condition)
        expected = reference.denoise(noise, condition, embeddings)
        feeds: list[Feed] = []
        hidden.runner.denoise(noise, condition, states, mask, _collector(feeds))
        truth = np.stack([reference.velocity(feed) for feed in feeds])
        decoded = hidden.runner.run_graph("vae_decoder", {"latent": expected})
        graphs["vae_decoder"] = difference(reference.decode(expected), decoded)
        for name, runner in runners.items():
            graphs[f"unet_{name}_{task}"] = difference(truth, np.stack([runner.run_graph("unet", feed) for feed in feeds]))
            began = time.perf_counter()
            latents = runner.denoise(noise, condition, states, mask)
            seconds[f"{task}_{name}_per_image"] = round((time.perf_counter() - began) / len(group), 4)
            end_to_end[f"{task}_{name}"] = difference(expected, latents)
            _write_samples(folder / "samples", f"{task}_{name}", latents, runner.decode(latents))
        for index, row in enumerate(group):
            record = {"task": task, "index": index, "text": row.text, "seed": row.seed, "source": None}
            if row.image is not None:
                record["source"] = f"{task}_{index}_source.png"
                Image.fromarray(row.image).save(folder / "samples" / record["source"])
            records.append(record)
    (folder / "samples" / "samples.json").write_text(json.dumps(records, indent=2))
    note = "max_abs and psnr_db against torch fp32; end_to_end: latents after all steps from the same noise"
    return {"note": note, "rows": len(rows), "graphs": graphs, "end_to_end": end_to_end}, seconds


def _write_samples(folder: Path, name: str, latents: np.ndarray, pictures: np.ndarray) -> None:
    np.savez(folder / f"{name}.npz", latents=latents, images=pictures)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{name}_{index}.png")


def _collector(feeds: list[Feed]) -> Any:
    return lambda _index, feed: feeds.append(feed)


def check_float_graphs(parity: dict[str, Any], settings: ExportSettings) -> None:
    """Stop on a float graph that does not compute what torch computes; int8 loss is reported, and gated by the flow."""
    floats = {name: value for name, value in (parity["graphs"] | parity["end_to_end"]).items() if "int8" not in name}
    for name, value in floats.items():
        if not value["max_abs"] <= settings.max_abs_error:
            raise ValueError(
                f"exported {name} differs from torch by {value['max_abs']:.2e}, allowed is {settings.max_abs_error:.0e} "
                "(export.max_abs_error); the graph is wrong, or its values are so large that the limit must be raised."
            )


