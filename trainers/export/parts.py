"""The graphs of a bundle, each written by its name from a checkpoint: what is in it and its example inputs.
Tracing is Python work on one core, so the graphs can be written side by side in processes of their own."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from trainers.export.graphs import UNET_INPUTS, UNetGraph, VaeDecoderGraph, VaeEncoderGraph, write_graph
from trainers.export.parity import TorchReference
from trainers.export.settings import ExportSettings
from trainers.export.source import Source, read_source
from trainers.export.text_graphs import EditEncoderGraph, EditLayout, TextEncoderGraph
from trainers.parallel import processors

ENCODERS = ("edit_encoder", "text_encoder")
GRAPHS = ("unet", *ENCODERS, "vae_decoder", "vae_encoder")
"""From the slowest to trace to the fastest."""


def write_graphs(
    source: Source, reference: TorchReference, settings: ExportSettings, folder: Path, processes: int | None = None
) -> None:
    """All ONNX files of the bundle into `folder`, the first one here and the others in a second process, which changes no byte.

    `processes` is 1 or 2; None takes two where this process may run on two processors.
    """
    processes = processes or min(2, processors())
    names = [name for name in GRAPHS if settings.text_encoder or name not in ENCODERS]
    if processes == 1:
        for name in names:
            write_named(name, source, reference, settings, folder)
        return
    # Spawned, for torch does not survive a fork.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        others = [pool.submit(_write_elsewhere, name, source.directory, settings, folder) for name in names[1:]]
        write_named(names[0], source, reference, settings, folder)
        for other in others:
            other.result()


def _write_elsewhere(name: str, checkpoint: Path, settings: ExportSettings, folder: Path) -> None:
    torch.set_num_threads(1)
    source = read_source(checkpoint, settings.steps)
    write_named(name, source, TorchReference(source, settings.steps), settings, folder)


def write_named(name: str, source: Source, reference: TorchReference, settings: ExportSettings, folder: Path) -> None:
    """One of `GRAPHS` as folder/<name>.onnx. Example inputs have batch 2, for a batch of 1 would be taken as a constant."""
    side, channels, length = source.latent_px, source.latent_channels, settings.sequence_tokens
    path = folder / f"{name}.onnx"
    if name == "unet":
        inputs = (
            torch.zeros(2, channels, side, 2 * side),
            torch.full((2,), 500.0),
            torch.zeros(2, length, source.text_width),
            torch.ones(2, length, dtype=torch.int64),
            torch.full((2, 2), float(source.size_px)),
        )
        write_graph(UNetGraph(reference.unet), dict(zip(UNET_INPUTS, inputs, strict=True)), "velocity", path)
    elif name == "vae_encoder":
        image = torch.zeros(2, 3, source.size_px, source.size_px)
        write_graph(VaeEncoderGraph(reference.vae), {"image": image}, "latent", path)
    elif name == "vae_decoder":
        write_graph(VaeDecoderGraph(reference.vae), {"latent": torch.zeros(2, channels, side, side)}, "image", path)
    elif name == "text_encoder":
        ids, mask = _token_rows(reference, source.prompts()["generate_template"], source.drop_generate + length)
        graph = TextEncoderGraph(reference.encoder.text_encoder, source.hidden_state)
        write_graph(graph, {"input_ids": ids, "attention_mask": mask}, "hidden_states", path)
    else:
        prompts, vision, encoder = source.prompts(), source.vision, reference.encoder.text_encoder
        template = prompts["edit_template"].replace(prompts["image_token"], prompts["image_token"] * vision.tokens)
        ids, mask = _token_rows(reference, template, source.drop_edit + length)
        places = (ids[0] == encoder.config.image_token_id).nonzero().flatten()
        layout = EditLayout(int(places[0]), vision.tokens, vision.grid)
        graph = EditEncoderGraph(encoder, source.hidden_state, layout, ids[:1], list(vision.mean), list(vision.std))
        inputs = {"pixels": torch.zeros(2, 3, *vision.grid_px), "input_ids": ids, "attention_mask": mask}
        write_graph(graph, inputs, "hidden_states", path)


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
