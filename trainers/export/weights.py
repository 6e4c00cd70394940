"""Smaller ONNX graphs of the same network without calibration: half precision, and weights in blocks of 4 or 8 bits.
Works on loaded graphs and leaves their inputs and outputs in float32, so that one runner runs them all."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trainers.export.quiet import log_level

CLOCKS = ("time_proj/",)
"""Layers that stay float32 in half precision: a timestep of 904.53 is 904.5 in fp16, and its sines would be of another time."""

FLOAT_ONLY = {"QuantizeLinear", "DequantizeLinear", "MatMulNBits", "Resize"}
"""Operators some of whose constant inputs must be float32 constants themselves (scales)."""

STORED_INT8_VALUES = 4096
"""Smaller weights (the convolutions at both ends) are worth more than the bytes."""

STORED_HALF_VALUES = 256
"""Constants with fewer values stay as they are: their Cast node would be as large as what it saves."""


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` computing in float16 but for its clocks; inputs and outputs keep their types."""
    # Imported late: the package pulls in tools for transformer models that only an export needs.
    from onnxruntime.transformers.float16 import convert_float_to_float16

    clocks = [node.name for node in model.graph.node if any(clock in node.name for clock in CLOCKS)]
    half = convert_float_to_float16(model, keep_io_types=True, node_block_list=clocks)
    _skip_casts_there_and_back(half)
    drop_unused(half)
    return half


def _skip_casts_there_and_back(model: onnx.ModelProto) -> None:
    """Let what reads a value that was cast to float16 and back read the value itself: a clock would have lost its digits on the way."""
    casts = {node.output[0]: (node, helper.get_attribute_value(node.attribute[0])) for node in model.graph.node if node.op_type == "Cast"}
    whole: dict[str, str] = {}
    for output, (node, target) in casts.items():
        inner = casts.get(node.input[0])
        if target == onnx.TensorProto.FLOAT and inner is not None and inner[1] == onnx.TensorProto.FLOAT16:
            whole[output] = inner[0].input[0]
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = whole.get(name, name)
    read = {name for node in model.graph.node for name in node.input} | {port.name for port in model.graph.output}
    for output, (node, _) in casts.items():
        if output in whole and output not in read:
            model.graph.node.remove(node)


def store_int8(model: onnx.ModelProto, nodes: Collection[str]) -> None:
    """Keep large float32 weights of the products and convolutions `nodes` as int8, one symmetric scale per output channel.

    A DequantizeLinear stands behind each: the arithmetic stays float (W8A16 on a phone), in the standard's own operators.
    """
    axes = {name: axis for node in model.graph.node if node.name in nodes and (axis := _output_axis(node)) is not None for name in node.input[1:2]}
    restored = []
    for tensor in [item for item in model.graph.initializer if item.name in axes and item.data_type == onnx.TensorProto.FLOAT]:
        name, axis, value = tensor.name, axes[tensor.name], numpy_helper.to_array(tensor)
        if value.size < STORED_INT8_VALUES:
            continue
        others = tuple(place for place in range(value.ndim) if place != axis)
        scale = np.maximum(np.abs(value).max(axis=others, keepdims=True) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(np.round(value / scale).astype(np.int8), f"{name}_int8"))
        # ONNX Runtime's optimizer takes an absent zero point for a scalar one and then fails on the axis.
        further = {f"{name}_scale": scale.reshape(-1), f"{name}_zero": np.zeros(scale.size, np.int8)}
        model.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in further.items())
        inputs = [f"{name}_int8", *further]
        restored.append(helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}/Dequantize", axis=axis))
    _put_first(model, restored)


def _put_first(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    everything = [*nodes, *model.graph.node]
    model.graph.ClearField("node")
    model.graph.node.extend(everything)


def _output_axis(node: onnx.NodeProto) -> int | None:
    """Axis of the output channels in the weight of a product or convolution."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and _plain_gemm(node)):
        return 0
    return 1 if node.op_type == "MatMul" else None


def store_half(model: onnx.ModelProto) -> None:
    """Keep large float32 constants of `model` as float16 with a Cast behind each, which runtimes fold when they load the graph."""
    users: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, set()).add(node.op_type)
    casts = []
    for tensor in model.graph.initializer:
        large = tensor.data_type == onnx.TensorProto.FLOAT and int(np.prod(tensor.dims)) >= STORED_HALF_VALUES
        if large and not users.get(tensor.name, set()) & FLOAT_ONLY:
            name = tensor.name
            value = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float16), f"{name}_half"))
            casts.append(helper.make_node("Cast", [f"{name}_half"], [name], name=f"{name}/Cast", to=onnx.TensorProto.FLOAT))
    _put_first(model, casts)


def to_blocks(model: onnx.ModelProto, bits: int, block: int, keep: Iterable[str] = ()) -> list[str]:
    """Turn the constant weights of `model`'s matrix products and 1x1 convolutions into symmetric blocks of `block` values.

    bits: 4 or 8, one float scale a block. keep: parts of node names that stay float. Returns the names of the changed nodes.
    Run on the raw export: ONNX Runtime's own pre-processing fuses products into Gemm, which the quantizer passes over.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    products_only(model)
    constants = {tensor.name for tensor in model.graph.initializer}
    products = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in constants]
    kept = [name for name in products if any(part in name for part in keep)]
    quantizer = MatMulNBitsQuantizer(model, bits=bits, block_size=block, is_symmetric=True, nodes_to_exclude=kept)
    with log_level(logging.WARNING, "onnxruntime.quantization.matmul_nbits_quantizer"):  # it tells of every node that it looks at
        quantizer.process()
    model.CopyFrom(quantizer.model.model)
    drop_unused(model)
    return [name for name in products if name not in kept]


def products_only(model: onnx.ModelProto) -> None:
    """Write every Gemm with constant weights, and every 1x1 convolution, as a MatMul with its bias added behind it."""
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        weight = values.get(node.input[1]) if node.op_type in ("Gemm", "Conv") else None
        if weight is not None and node.op_type == "Gemm" and _plain_gemm(node):
            nodes += _product(model, node, numpy_helper.to_array(weight).T, node.input[0], node.output[0])
        elif weight is not None and node.op_type == "Conv" and _pointwise(node, list(weight.dims)):
            rows, product = f"{node.output[0]}_rows", f"{node.output[0]}_product"
            nodes.append(helper.make_node("Transpose", [node.input[0]], [rows], name=f"{node.name}/Rows", perm=[0, 2, 3, 1]))
            nodes += _product(model, node, numpy_helper.to_array(weight)[:, :, 0, 0].T, rows, product)
            nodes.append(helper.make_node("Transpose", [product], [node.output[0]], name=f"{node.name}/Columns", perm=[0, 3, 1, 2]))
        else:
            nodes.append(node)
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    drop_unused(model)


def _product(model: onnx.ModelProto, node: onnx.NodeProto, weight: np.ndarray, value: str, output: str) -> list[onnx.NodeProto]:
    """`value` times `weight` (in, out) plus the node's bias where it has one, as `output`; the product keeps the node's name."""
    name = f"{node.input[1]}_columns"
    if name not in {tensor.name for tensor in model.graph.initializer}:
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight), name))
    if len(node.input) < 3:
        return [helper.make_node("MatMul", [value, name], [output], name=node.name)]
    middle = f"{output}_unbiased"
    return [
        helper.make_node("MatMul", [value, name], [middle], name=node.name),
        helper.make_node("Add", [middle, node.input[2]], [output], name=f"{node.name}/Bias"),
    ]


def _plain_gemm(node: onnx.NodeProto) -> bool:
    """Whether the node is what a linear layer becomes: x W^T + b."""
    given = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    return given.get("transB", 0) == 1 and not given.get("transA", 0) and given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0


def _pointwise(node: onnx.NodeProto, shape: list[int]) -> bool:
    given = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    plain = given.get("group", 1) == 1 and set(given.get("strides", [1])) == {1} and not any(given.get("pads", [0]))
    return plain and shape[2:] == [1, 1]


def drop_unused(model: onnx.ModelProto) -> None:
    """Remove constants that no node reads."""
    read = {name for node in model.graph.node for name in node.input} | {port.name for port in model.graph.output}
    # By place, from the end: remove() compares whole tensors until it meets the one it looks for.
    for place in reversed(range(len(model.graph.initializer))):
        if model.graph.initializer[place].name not in read:
            del model.graph.initializer[place]
