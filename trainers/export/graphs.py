"""Writes a prepared part as an ONNX graph with a free batch axis and no traces of this machine.
Equal modules give equal bytes: nodes are named by their layer, and nothing of the exporter's notes stays."""

from __future__ import annotations

import ast
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from trainers.export.quiet import quiet

OPSET = 18
MAX_BATCH = 63
"""diffusers' upsampler takes another path from batch 64 on, so the exported batch axis stays below it."""


def write_graph(module: nn.Module, inputs: dict[str, Tensor], output: str, path: Path) -> None:
    """Export `module` to ONNX at `path` with the batch axis (0) of every input free up to MAX_BATCH.

    The file holds no stack traces, source paths or exporter notes. Raises ValueError naming the part on failure.
    """
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    shapes = {name: {0: batch} for name in inputs}
    with quiet("torch.onnx"), torch.no_grad():
        program = torch.export.export(module.eval(), (), kwargs=inputs, dynamic_shapes=shapes, strict=False)
        result = torch.onnx.export(
            program,
            (),
            kwargs=inputs,
            dynamo=True,
            input_names=list(inputs),
            output_names=[output],
            opset_version=OPSET,
            verbose=False,
        )
    model = result.model_proto
    _name_nodes_by_layer(model)
    for item in (*model.graph.input, *model.graph.output):
        for size in item.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = "batch"
    save_clean(model, path)


def _name_nodes_by_layer(model: onnx.ModelProto) -> None:
    """Name each node after the layer it came from ('down_blocks.0.resnets.0.conv1.pointwise/Conv'), once each.

    The exporter keeps the layer in metadata that we drop; the names stay readable for quantization and for people.
    """
    seen: dict[str, int] = {}
    for node in model.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key.endswith("name_scopes")), "[]")
        layers = [scope for scope in ast.literal_eval(scopes)[:-1] if scope]
        name = f"{layers[-1] if layers else 'graph'}/{node.op_type}"
        seen[name] = seen.get(name, 0) + 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def _shorten_tensor_names(model: onnx.ModelProto) -> None:
    ports = {port.name for port in (*model.graph.input, *model.graph.output)}
    short = {"": ""}
    for name in (*(tensor.name for tensor in model.graph.initializer), *(name for node in model.graph.node for name in node.output)):
        if name not in short:
            short[name] = name if name in ports else f"t{len(short)}"
    for tensor in model.graph.initializer:
        tensor.name = short[tensor.name]
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = short.get(name, name)


def save_clean(model: onnx.ModelProto, path: Path) -> None:
    """Write `model` without doc strings and metadata, which hold absolute source paths and a third of a small file.

    Nor with shapes of intermediate values, which readers infer: the exporter's own sizes of 2 * batch are no names. Tensors get
    short names, for long ones are a tenth of a small int8 graph; inputs, outputs and nodes keep theirs.
    """
    _shorten_tensor_names(model)
    model.ClearField("metadata_props")
    model.doc_string = ""
    model.graph.ClearField("metadata_props")
    model.graph.ClearField("value_info")
    model.graph.doc_string = ""
    for item in (*model.graph.node, *model.graph.input, *model.graph.output):
        item.doc_string = ""
        item.ClearField("metadata_props")
    for tensor in model.graph.initializer:
        tensor.doc_string = ""
        tensor.ClearField("metadata_props")
    for function in model.functions:
        function.doc_string = ""
        function.ClearField("metadata_props")
        for node in function.node:
            node.doc_string = ""
            node.ClearField("metadata_props")
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
