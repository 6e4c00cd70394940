"""Gives back, in the biases behind products with coarse weights, what rounding takes from their mean output.
b += (W - W') E[x], E over the student's own calls (Nagel et al. 2019, arXiv 1906.04721, section 4.2): no bytes, no time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trainers.export.sensitivity import Feed, Run, mean_square, psnr_db, run_as_written
from trainers.export.sessions import session
from trainers.export.weights import products_only


def correct_biases(small: onnx.ModelProto, original: onnx.ModelProto, feed: Feed) -> int:
    """Correct, in place, the constant biases behind `small`'s MatMulNBits nodes by the mean inputs that `original` has on `feed`.

    Both come from one export, `original` with its float weights. Returns how many biases were corrected; products without
    a bias that is theirs alone stay as they are.
    """
    reference = onnx.ModelProto()
    reference.CopyFrom(original)
    products_only(reference)
    products = {node.output[0]: node for node in reference.graph.node if node.op_type == "MatMul"}
    coarse = [node for node in small.graph.node if node.op_type == "MatMulNBits"]
    means = _mean_inputs(reference, sorted({products[node.output[0]].input[0] for node in coarse}), feed)
    weights = {tensor.name: tensor for tensor in reference.graph.initializer}
    constants = {tensor.name: tensor for tensor in small.graph.initializer}
    lost = {}
    for node in coarse:
        product = products[node.output[0]]
        exact = numpy_helper.to_array(weights[product.input[1]]).T
        lost[node.output[0]] = (exact - dequantized(node, constants)) @ means[product.input[0]]
    readers = Counter(name for node in small.graph.node for name in node.input)
    corrected = 0
    for node in small.graph.node:
        for value, bias in (tuple(node.input), tuple(node.input)[::-1]) if node.op_type == "Add" else ():
            if value in lost and bias in constants and readers[bias] == 1 and list(constants[bias].dims) == [len(lost[value])]:
                mended = numpy_helper.to_array(constants[bias]) + lost[value].astype(np.float32)
                constants[bias].CopyFrom(numpy_helper.from_array(mended, bias))
                corrected += 1
    return corrected


def gain_db(small: onnx.ModelProto, corrected: onnx.ModelProto, original: onnx.ModelProto, feed: Feed, run: Run = run_as_written) -> tuple[float, float]:
    """PSNR in dB of both to `original` on `feed`."""
    truth = [run(original, feed)]
    before, after = (psnr_db(mean_square([run(model, feed)], truth), truth) for model in (small, corrected))
    return before, after


def dequantized(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> np.ndarray:
    """The weights (N, K) that a symmetric MatMulNBits node multiplies by: (stored - 2^(bits-1)) * scale, block by block along K."""
    given = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    rows, bits, block = given["N"], given["bits"], given["block_size"]
    stored, scales = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
    if bits == 4:  # two values a byte, the lower half first
        stored = np.stack([stored & 15, stored >> 4], axis=-1)
    values = stored.reshape(rows, -1, block).astype(np.float32) - 2 ** (bits - 1)
    return (values * scales.reshape(rows, -1, 1)).reshape(rows, -1)[:, : given["K"]]


def _mean_inputs(model: onnx.ModelProto, names: list[str], feed: Feed) -> dict[str, np.ndarray]:
    """Mean over rows and positions of the tensors `names` of `model`, one value a channel (the last axis)."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    for name in names:
        probe.graph.output.append(helper.make_empty_tensor_value_info(name))
    values = session(probe).run(names, feed)
    return {name: value.reshape(-1, value.shape[-1]).mean(axis=0) for name, value in zip(names, values, strict=True)}
