"""The samples of a bundle: what torch made of some rows, and how far a variant's runner comes out from it.
Without torch, so that the same comparison runs at export, in `dreamlite verify`, and in a phone team's own checks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainers.export.runner import Runner

FOLDER = "samples"
ARRAYS = ("noise", "condition", "hidden_states", "mask", "sample", "timestep", "velocity", "latents", "decoded", "images")


@dataclass(frozen=True)
class Samples:
    """Rows of one task and what torch in float32 makes of them.

    texts, seeds, sources (uint8 (H, W, 3) or None) per row; `arrays` by the names in ARRAYS: noise, condition and latents
    (N, C, h, w); hidden_states (N, S, C) and mask (N, S); of row 0 alone the UNet's sample, timestep and velocity at each
    step and the decoded image (1, 3, H, W), not clamped; images uint8 (N, H, W, 3).
    """

    task: str
    texts: list[str]
    seeds: list[int]
    sources: list[np.ndarray | None]
    arrays: dict[str, np.ndarray]

    def unet_inputs(self, time_ids: tuple[float, float]) -> dict[str, np.ndarray]:
        """The UNet's five inputs for row 0 at every step, as one batch."""
        steps = len(self.arrays["timestep"])
        return {
            "sample": self.arrays["sample"],
            "timestep": self.arrays["timestep"],
            "encoder_hidden_states": self.arrays["hidden_states"][:1].repeat(steps, axis=0),
            "encoder_attention_mask": self.arrays["mask"][:1].astype(np.int64).repeat(steps, axis=0),
            "time_ids": np.tile(np.asarray([time_ids], np.float32), (steps, 1)),
        }


def save_samples(bundle: Path, groups: list[Samples]) -> None:
    """Write bundle/samples: samples.json, one .npz a task, and pictures to look at."""
    folder = bundle / FOLDER
    folder.mkdir()
    records = []
    for group in groups:
        # One array a file would be many files; np.savez writes no times, so equal arrays are equal bytes.
        np.savez(folder / f"{group.task}.npz", **{name: group.arrays[name] for name in ARRAYS})
        for index, (text, seed, source) in enumerate(zip(group.texts, group.seeds, group.sources, strict=True)):
            record = {"task": group.task, "index": index, "text": text, "seed": seed, "source": None, "image": f"{group.task}_{index}.png"}
            Image.fromarray(group.arrays["images"][index]).save(folder / record["image"])
            if source is not None:
                record["source"] = f"{group.task}_{index}_source.png"
                Image.fromarray(source).save(folder / record["source"])
            records.append(record)
    (folder / "samples.json").write_text(json.dumps(records, indent=2) + "\n")


def load_samples(bundle: Path) -> list[Samples]:
    """What `save_samples` wrote, one entry a task."""
    folder = bundle / FOLDER
    records = json.loads((folder / "samples.json").read_text())
    groups = []
    for task in dict.fromkeys(record["task"] for record in records):
        mine = [record for record in records if record["task"] == task]
        with np.load(folder / f"{task}.npz", allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ARRAYS}
        sources = [None if record["source"] is None else np.asarray(Image.open(folder / record["source"])) for record in mine]
        groups.append(Samples(task, [record["text"] for record in mine], [record["seed"] for record in mine], sources, arrays))
    return groups


def compare(runner: Runner, groups: list[Samples]) -> dict[str, dict[str, Any]]:
    """Differences to torch of one variant: every graph alone on torch's inputs, then latents and images from text, seed and source.

    {'graphs': {graph: {max_abs, psnr_db}}, 'latents': {task: ...}, 'images': {task: ...}}; images in 8-bit steps.
    """
    graphs: dict[str, Any] = {}
    latents: dict[str, Any] = {}
    images: dict[str, Any] = {}
    shape = runner.manifest["shapes"]["image"]
    for group in groups:
        task, stored = group.task, group.arrays
        states, mask = stored["hidden_states"], stored["mask"]
        encoder = "text_encoder" if task == "generate" else "edit_encoder"
        if encoder in runner.files:
            states, mask = runner.encode_prompts(group.texts) if task == "generate" else runner.encode_edits(group.sources, group.texts)
            graphs[encoder] = difference(kept(stored["hidden_states"], stored["mask"]), kept(states, mask))
        condition = np.zeros_like(stored["noise"])
        if task == "edit":
            condition = runner.encode_images(group.sources)
            graphs["vae_encoder"] = difference(stored["condition"], condition)
        velocity = runner.run_graph("unet", group.unet_inputs((shape["width"], shape["height"])))
        graphs[f"unet_{task}"] = difference(stored["velocity"], velocity)
        decoded = runner.run_graph("vae_decoder", {"latent": stored["latents"][:1]})
        graphs["vae_decoder"] = difference(stored["decoded"], decoded)
        made = runner.denoise(runner.initial_noise(group.seeds), condition, states, mask)
        latents[task] = difference(stored["latents"], made)
        images[task] = difference(stored["images"], runner.decode(made))
    return {"graphs": dict(sorted(graphs.items())), "latents": latents, "images": images}


def difference(reference: np.ndarray, value: np.ndarray) -> dict[str, float]:
    """max_abs, and PSNR in dB over the reference's range: 20 log10((max - min) / rmse), worst row, 200 where equal."""
    if reference.shape != value.shape:
        raise ValueError(f"the result has shape {value.shape}, expected is {reference.shape}; the graph is another model's.")
    reference, value = reference.astype(np.float64), value.astype(np.float64)
    span = max(float(reference.max() - reference.min()), 1e-12)
    worst = max(float(np.mean((row - other) ** 2)) for row, other in zip(reference, value, strict=True)) ** 0.5
    psnr = 200.0 if worst == 0 else 20 * np.log10(span / worst)
    return {"max_abs": float(np.abs(reference - value).max()), "psnr_db": round(float(min(psnr, 200.0)), 2)}


def kept(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The unmasked rows of (N, S, C) as (1, tokens, C): what the UNet reads, whatever stands in the padding."""
    return states[mask.astype(bool)][None]
