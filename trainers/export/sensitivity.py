"""Which blocks of a quantized UNet hurt, and the mixed precision that follows from it under a size budget.
One QDQ graph is quantized once; blocks go back to float by taking their Q/DQ pairs out again, so ranges stay as calibrated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx

from trainers.export.sessions import session
from trainers.export.weights import drop_unused

BLOCK = re.compile(r"^(.*?(?:resnets|attentions|downsamplers|upsamplers)\.\d+)")
"""A block is a resnet, a transformer or a resampler; any other layer is a block of its own."""

Feed = dict[str, np.ndarray]
Run = Callable[[onnx.ModelProto, Feed], np.ndarray]


def first_calls(feeds: list[Feed], rows: int) -> Feed:
    """The first `rows` rows of each task at each deployed sigma, as one batch."""
    firsts: dict[tuple[bool, float], Feed] = {}
    for feed in feeds:
        edit = bool(feed["sample"][..., feed["sample"].shape[3] // 2 :].any())
        firsts.setdefault((edit, float(feed["timestep"][0])), {name: value[:rows] for name, value in feed.items()})
    return {name: np.concatenate([feed[name] for feed in firsts.values()]) for name in feeds[0]}


def run_as_written(model: onnx.ModelProto, feed: Feed) -> np.ndarray:
    """Velocity of a graph that is not saved, with its Q/DQ pairs computed as written: what int8 costs, free of a kernel's own faults."""
    return session(model, as_written=True).run(None, feed)[0]


def blocks(nodes: Iterable[str]) -> dict[str, list[str]]:
    """Node names by the block they belong to, in the order of the graph."""
    found: dict[str, list[str]] = {}
    for name in nodes:
        layer = name.split("/")[0]
        match = BLOCK.match(layer)
        found.setdefault(match[1] if match else layer, []).append(name)
    return found


def with_float(quantized: onnx.ModelProto, original: onnx.ModelProto, names: set[str]) -> onnx.ModelProto:
    """`quantized` with the nodes `names` computing in float again on the weights of `original`.

    Float nodes, and residual streams that no int8 node made, read full precision; all other ranges and scales stay.
    """
    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    makers = {output: node for node in model.graph.node for output in node.output}
    originals = {node.name: node for node in original.graph.node}
    weights = {tensor.name: tensor for tensor in original.graph.initializer}
    stored = {tensor.name for tensor in model.graph.initializer}
    int8 = {node.name for node in model.graph.node if _is_int8(node, makers)} - names
    for node in model.graph.node:
        if node.name in int8 or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for place, name in enumerate(node.input):
            maker = makers.get(name)
            if maker is None or maker.op_type != "DequantizeLinear":
                continue
            quantizer = makers.get(maker.input[0])
            if quantizer is None:
                # The quantizer gives what it dequantizes the name of the constant it replaced.
                tensor = weights[originals[node.name].input[place]]
                node.input[place] = f"{tensor.name}_float"
                if node.input[place] not in stored:
                    stored.add(node.input[place])
                    model.graph.initializer.append(tensor)
                    model.graph.initializer[-1].name = node.input[place]
            elif node.name in names or makers.get(quantizer.input[0], node).name not in int8:
                node.input[place] = quantizer.input[0]
    _drop_dead_nodes(model)
    return model


def _is_int8(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> bool:
    """Whether the node multiplies by a weight that is stored in 8 bits."""
    weight = makers.get(node.input[1]) if node.op_type in ("Conv", "MatMul", "Gemm") else None
    return weight is not None and weight.op_type == "DequantizeLinear" and weight.input[0] not in makers


def _drop_dead_nodes(model: onnx.ModelProto) -> None:
    outputs = {port.name for port in model.graph.output}
    while True:
        read = {name for node in model.graph.node for name in node.input} | outputs
        dead = [node for node in model.graph.node if not read & set(node.output)]
        if not dead:
            break
        for node in dead:
            model.graph.node.remove(node)
    drop_unused(model)


def scan(quantized: onnx.ModelProto, original: onnx.ModelProto, nodes: list[str], feeds: list[Feed], run: Run) -> list[dict[str, Any]]:
    """Harm of each block: PSNR of the velocity in dB when it alone is int8, and its weight bytes in int8; the worst for its bytes first."""
    groups = blocks(nodes)
    truth = [run(original, feed) for feed in feeds]
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in original.graph.initializer}
    weight = {node.name: node.input[1] for node in original.graph.node if len(node.input) > 1}
    found = []
    for block, names in groups.items():
        alone = with_float(quantized, original, set(nodes) - set(names))
        error = mean_square([run(alone, feed) for feed in feeds], truth)
        values = sum(sizes[weight[name]] for name in names)
        found.append({"block": block, "psnr_db": psnr_db(error, truth), "bytes": values, "harm": error / values})
    found.sort(key=lambda item: -item.pop("harm"))
    return found


def mean_square(values: list[np.ndarray], truth: list[np.ndarray]) -> float:
    """Mean squared error over all feeds."""
    return float(np.mean([np.mean((value.astype(np.float64) - true) ** 2) for value, true in zip(values, truth, strict=True)]))


def psnr_db(error: float, truth: list[np.ndarray]) -> float:
    """PSNR in dB of a mean squared error over the range of `truth`; 200 where there is none."""
    span = max(float(max(value.max() for value in truth) - min(value.min() for value in truth)), 1e-12)
    return 200.0 if error == 0 else round(float(min(20 * np.log10(span) - 10 * np.log10(error), 200.0)), 2)


def mix(
    quantized: onnx.ModelProto,
    original: onnx.ModelProto,
    ranked: list[dict[str, Any]],
    nodes: list[str],
    feeds: list[Feed],
    run: Run,
    *,
    psnr_target_db: float,
    spare_bytes: int,
) -> tuple[onnx.ModelProto, list[str], float]:
    """Blocks back to float in the order of `ranked` until the velocity reaches `psnr_target_db` or no next block fits `spare_bytes`.

    A float weight costs one byte more than an int8 one, for it is stored in half precision. Returns the graph, the blocks that
    went back, and the PSNR in dB that was reached on `feeds`.
    """
    groups, back = blocks(nodes), list[str]()
    truth = [run(original, feed) for feed in feeds]
    model = quantized
    reached = psnr_db(mean_square([run(model, feed) for feed in feeds], truth), truth)
    for item in ranked:
        if reached >= psnr_target_db:
            break
        if item["bytes"] > spare_bytes:
            continue
        spare_bytes -= item["bytes"]
        back.append(item["block"])
        model = with_float(quantized, original, {name for block in back for name in groups[block]})
        reached = psnr_db(mean_square([run(model, feed) for feed in feeds], truth), truth)
    return model, back, reached
