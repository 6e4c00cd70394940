"""Runs a fresh bundle beside the torch checkpoint: the calibration trajectory, parity per graph and end to end,
and the samples that a phone port can be checked against."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainers.conditioning import Embeddings
from trainers.export.encoder_weights import load_packed
from trainers.export.parity import TorchReference
from trainers.export.rows import TASKS, Row
from trainers.export.runner import Runner, to_pixels
from trainers.export.samples import Samples, compare, difference, kept, load_samples
from trainers.export.sensitivity import Feed
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
        return _in_room(self.reference.embed(rows), self.settings.sequence_tokens)


def _in_room(embeddings: Embeddings, room: int) -> tuple[np.ndarray, np.ndarray]:
    """States and mask cut or padded to the bundle's `room` tokens."""
    states = np.zeros((len(embeddings.states), room, embeddings.states.shape[2]), np.float32)
    mask = np.zeros((len(states), room), np.int64)
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


def make_samples(reference: TorchReference, hidden: Embedder, rows: Sequence[Row]) -> list[Samples]:
    """What torch makes of the rows, from its own text states and latents on; only the noise is drawn as the runner draws it."""
    room = hidden.settings.sequence_tokens
    groups = []
    for group in _by_task(rows):
        noise = hidden.runner.initial_noise([row.seed for row in group])
        condition = np.zeros_like(noise)
        if group[0].task == "edit":
            condition = reference.encode_images([row.image for row in group])
        embeddings = reference.embed(group)
        calls: list[Feed] = []
        latents = reference.denoise(noise, condition, embeddings, calls.append)
        decoded = reference.decode(latents)
        states, mask = _in_room(embeddings, room)
        arrays = {
            "noise": noise,
            "condition": condition,
            "hidden_states": states,
            "mask": mask,
            "sample": np.concatenate([call["sample"][:1] for call in calls]),
            "timestep": np.concatenate([call["timestep"][:1] for call in calls]),
            "velocity": np.concatenate([call["velocity"][:1] for call in calls]),
            "latents": latents,
            "decoded": decoded[:1],
            "images": to_pixels(decoded),
        }
        groups.append(Samples(group[0].task, [row.text for row in group], [row.seed for row in group], [row.image for row in group], arrays))
    return groups


def measure(folder: Path, variants: Sequence[str], threads: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Differences of every variant to the samples in `folder`, for the manifest, and seconds per comparison."""
    samples = load_samples(folder)
    graphs: dict[str, Any] = {}
    latents: dict[str, Any] = {}
    images: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for variant in variants:
        began = time.perf_counter()
        found = compare(Runner(folder, variant, threads), samples)
        seconds[f"parity_{variant}"] = round(time.perf_counter() - began, 2)
        graphs |= {f"{name}_{variant}": value for name, value in found["graphs"].items()}
        latents |= {f"{task}_{variant}": value for task, value in found["latents"].items()}
        images |= {f"{task}_{variant}": value for task, value in found["images"].items()}
    note = (
        "max_abs and psnr_db (worst row) against torch fp32; graphs: each alone on torch's inputs; end_to_end: latents from text, "
        "source and seed after all steps; images: of those, in 8-bit steps"
    )
    rows = sum(len(group.texts) for group in samples)
    return {"note": note, "rows": rows, "graphs": graphs, "end_to_end": latents, "images": images}, seconds


def measure_encoder(reference: TorchReference, samples: Sequence[Samples], rows: Sequence[Row], folder: Path, bits: int) -> dict[str, Any]:
    """What comes out of the encoder's packed weights, states and then the latents of the float UNet, against the samples.

    The packed values take the place of the reference's own: an encoder of 2 B does not fit twice. So this is the last thing asked of it.
    """
    load_packed(reference.encoder.text_encoder, folder, bits)
    states: dict[str, Any] = {}
    latents: dict[str, Any] = {}
    for group, sample in zip(_by_task(rows), samples, strict=True):
        stored, embeddings = sample.arrays, reference.embed(group)
        found, mask = _in_room(embeddings, stored["mask"].shape[1])
        states[sample.task] = difference(kept(stored["hidden_states"], stored["mask"]), kept(found, mask))
        latents[sample.task] = difference(stored["latents"], reference.denoise(stored["noise"], stored["condition"], embeddings))
    return {"states": states, "latents": latents}


def _collector(feeds: list[Feed]) -> Any:
    return lambda _index, feed: feeds.append(feed)


def check_float_graphs(parity: dict[str, Any], settings: ExportSettings) -> None:
    """Stop on a float graph that does not compute what torch computes; what smaller variants lose is reported, and gated by the flow."""
    floats = {name: value for name, value in (parity["graphs"] | parity["end_to_end"]).items() if name.endswith("_fp32")}
    for name, value in floats.items():
        if not value["max_abs"] <= settings.max_abs_error:
            raise ValueError(
                f"exported {name} differs from torch by {value['max_abs']:.2e}, allowed is {settings.max_abs_error:.0e} "
                "(export.max_abs_error); the graph is wrong, or its values are so large that the limit must be raised."
            )


