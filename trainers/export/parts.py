"""Writes the ONNX graphs of a bundle, each by its name, from a checkpoint.
Tracing is Python work on one core, so the graphs can be written side by side in processes of their own."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from trainers.export.graphs import write_graph
from trainers.export.parity import TorchReference
from trainers.export.prepare import part_names, prepare_part
from trainers.export.settings import ExportSettings
from trainers.export.source import Source, read_source
from trainers.parallel import processors


def write_graphs(
    source: Source, reference: TorchReference, settings: ExportSettings, folder: Path, processes: int | None = None
) -> None:
    """All ONNX files of the bundle into `folder`, the first one here and the others in a second process, which changes no byte.

    `processes` is 1 or 2; None takes two where this process may run on two processors.
    """
    processes = processes or min(2, processors())
    names = part_names(settings)
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
    """One of `prepare.GRAPHS` as folder/<name>.onnx. Traced with batch 2, for a batch of 1 would be taken as a constant."""
    part = prepare_part(name, source, reference, settings, batch=2)
    write_graph(part.module, part.inputs, part.output, folder / f"{name}.onnx")
