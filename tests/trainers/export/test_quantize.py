"""Smaller weights keep the function as far as their bits allow, cover what they must, and mixed precision follows the scan.
On a graph of four layers with a UNet's names, so that every property is seen in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from trainers.export.bias_correction import correct_biases, dequantized, gain_db
from trainers.export.graphs import save_clean
from trainers.export.quantize import quantize_unet
from trainers.export.runner import Runner
from trainers.export.sensitivity import blocks, mix, scan, with_float
from trainers.export.settings import ExportSettings
from trainers.export.weights import store_half, store_int8, to_blocks, to_half

WIDTH = 32


def small_graph(path: Path) -> onnx.ModelProto:
    """sample (N, 32, 4, 8) and timestep (N,) through a clock, a 3x3 convolution with its residual, a 1x1 one and a linear layer."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        fan_in = int(np.prod(shape[1:]))
        return numpy_helper.from_array((rng.normal(size=shape) / fan_in**0.5).astype(np.float32), name)

    # An outlier channel, as trained nets have them, makes the second block the harmful one.
    outlier = weight("pointwise.weight", WIDTH, WIDTH, 1, 1)
    value = numpy_helper.to_array(outlier).copy()
    value[:, 0] *= 60
    outlier = numpy_helper.from_array(value, outlier.name)
    nodes = [
        helper.make_node("Unsqueeze", ["timestep", "axes"], ["time"], name="unet.time_proj/Unsqueeze"),
        helper.make_node("Mul", ["time", "rate"], ["phase"], name="unet.time_proj/Mul"),
        helper.make_node("Sin", ["phase"], ["clock"], name="unet.time_proj/Sin"),
        helper.make_node("Add", ["sample", "clock"], ["x"], name="unet/Add"),
        helper.make_node("Conv", ["x", "conv.weight", "bias"], ["y"], name="unet.down.resnets.0.conv1/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["x", "y"], ["z"], name="unet.down.resnets.0/Add"),
        helper.make_node("Conv", ["z", "pointwise.weight"], ["w"], name="unet.down.resnets.1.conv1.pointwise/Conv"),
        helper.make_node("ReduceMean", ["w", "spatial"], ["pooled"], name="unet/ReduceMean", keepdims=0),
        helper.make_node("Gemm", ["pooled", "head.weight", "head.bias"], ["head"], name="unet.head/Gemm", transB=1),
        helper.make_node("Reshape", ["head", "column"], ["column_out"], name="unet/Reshape"),
        helper.make_node("Add", ["w", "column_out"], ["velocity"], name="unet/Add_2"),
    ]
    constants = [
        weight("conv.weight", WIDTH, WIDTH, 3, 3),
        outlier,
        weight("head.weight", WIDTH, WIDTH),
        weight("bias", WIDTH),
        weight("head.bias", WIDTH),
        numpy_helper.from_array(np.asarray([1, 2, 3], np.int64), "axes"),
        numpy_helper.from_array(np.asarray([2, 3], np.int64), "spatial"),
        numpy_helper.from_array(np.asarray([-1, WIDTH, 1, 1], np.int64), "column"),
        numpy_helper.from_array(np.full((1, 1, 1, 1), 1.0, np.float32), "rate"),
    ]
    ports = [helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["batch", WIDTH, 4, 8]),
             helper.make_tensor_value_info("timestep", TensorProto.FLOAT, ["batch"])]  # fmt: skip
    output = helper.make_tensor_value_info("velocity", TensorProto.FLOAT, ["batch", WIDTH, 4, 8])
    model = helper.make_model(helper.make_graph(nodes, "unet", ports, [output], constants), opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return model


def feeds(count: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    sigmas = (1000.0, 904.53, 512.84)
    return [
        {"sample": rng.normal(size=(count, WIDTH, 4, 8)).astype(np.float32), "timestep": np.full(count, sigma, np.float32)}
        for sigma in sigmas
    ]


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feed)[0]


def psnr(model: onnx.ModelProto, other: onnx.ModelProto) -> float:
    truth, value = (np.stack([run(graph, feed) for feed in feeds()]) for graph in (model, other))
    return float(20 * np.log10(np.ptp(truth) / max(np.sqrt(np.mean((truth - value) ** 2)), 1e-12)))


@pytest.fixture()
def original(tmp_path: Path) -> onnx.ModelProto:
    return small_graph(tmp_path / "unet.onnx")


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    other = onnx.ModelProto()
    other.CopyFrom(model)
    return other


def test_half_precision_keeps_its_clock(original: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    """sin(904.53) is not sin(904.5): with the clock in half precision too, the result is another time's."""
    half = to_half(copy_of(original))
    assert [port.type.tensor_type.elem_type for port in (*half.graph.input, *half.graph.output)] == [TensorProto.FLOAT] * 3
    assert half.ByteSize() < original.ByteSize() * 0.6
    assert psnr(original, half) > 60
    monkeypatch.setattr("trainers.export.weights.CLOCKS", ())
    assert psnr(original, to_half(copy_of(original))) < 50


def test_half_storage_computes_in_float(original: onnx.ModelProto) -> None:
    stored = copy_of(original)
    store_half(stored)
    assert stored.ByteSize() < original.ByteSize() * 0.6
    assert psnr(original, stored) > 60


def test_int8_storage_computes_in_float_and_reaches_the_named_layers_alone(original: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.export.weights.STORED_INT8_VALUES", 1000)
    stored = copy_of(original)
    store_int8(stored, ["unet.head/Gemm", "unet.down.resnets.0.conv1/Conv"])
    onnx.checker.check_model(stored)
    assert {tensor.name for tensor in stored.graph.initializer if tensor.data_type == TensorProto.INT8 and tensor.name.endswith("_int8")} == {"head.weight_int8", "conv.weight_int8"}
    assert 45 < psnr(original, stored) < 100


@pytest.mark.parametrize(("bits", "least_db"), [(8, 45), (4, 20)])
def test_blocks_cover_every_product(original: onnx.ModelProto, bits: int, least_db: float) -> None:
    """The 1x1 convolution and the 2-D Gemm too, which ONNX Runtime's quantizer alone passes over; the 3x3 one stays."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    small = copy_of(original)
    changed = to_blocks(small, bits, 16)
    assert set(changed) == {"unet.down.resnets.1.conv1.pointwise/Conv", "unet.head/Gemm"}
    kinds = [node.op_type for node in small.graph.node]
    assert kinds.count("MatMulNBits") == 2 and kinds.count("Conv") == 1 and "Gemm" not in kinds
    assert least_db < psnr(original, small) < 100
    alone = MatMulNBitsQuantizer(copy_of(original), bits=bits, block_size=16, is_symmetric=True)
    alone.process()
    assert not [node for node in alone.model.model.graph.node if node.op_type == "MatMulNBits"]
    assert to_blocks(copy_of(original), bits, 16, keep=("head",)) == ["unet.down.resnets.1.conv1.pointwise/Conv"]


def test_a_saved_graph_has_short_tensor_names_and_computes_the_same(original: onnx.ModelProto, tmp_path: Path) -> None:
    saved = copy_of(original)
    save_clean(saved, tmp_path / "saved.onnx")
    saved = onnx.load(tmp_path / "saved.onnx")
    assert {node.name for node in saved.graph.node} == {node.name for node in original.graph.node}
    assert all(len(tensor.name) < 5 for tensor in saved.graph.initializer)
    assert np.array_equal(run(saved, feeds()[0]), run(original, feeds()[0]))


def test_products_are_exact_before_they_are_quantized(original: onnx.ModelProto) -> None:
    rewritten = copy_of(original)
    assert to_blocks(rewritten, 4, 16, keep=("unet",)) == []
    assert {"Gemm"}.isdisjoint(node.op_type for node in rewritten.graph.node)
    assert psnr(original, rewritten) > 120


def test_biases_give_back_the_mean_that_rounding_took(original: onnx.ModelProto) -> None:
    """The mean error of the corrected layer's output goes to nothing, on the calls that it was fitted to."""
    small = copy_of(original)
    to_blocks(small, 4, 16)
    node = next(node for node in small.graph.node if node.op_type == "MatMulNBits" and "head" in node.name)
    constants = {tensor.name: tensor for tensor in small.graph.initializer}
    exact = numpy_helper.to_array(next(tensor for tensor in original.graph.initializer if tensor.name == "head.weight"))
    assert 0 < np.abs(dequantized(node, constants) - exact).max() < np.abs(exact).max() / 7

    corrected, calls = copy_of(small), {name: np.concatenate([feed[name] for feed in feeds()]) for name in ("sample", "timestep")}
    assert correct_biases(corrected, original, calls) == 1  # the 1x1 convolution has no bias, the 3x3 one keeps its weights

    def head(model: onnx.ModelProto) -> np.ndarray:
        probe = copy_of(model)
        probe.graph.output.insert(0, helper.make_empty_tensor_value_info("head"))
        return run(probe, calls)

    # Only the head is coarse where its inputs come out of float layers.
    alone, mended = copy_of(original), copy_of(original)
    for model in (alone, mended):
        to_blocks(model, 4, 16, keep=("pointwise",))
    assert correct_biases(mended, original, calls) == 1
    before, after = (np.abs((head(model) - head(original)).mean(axis=0)).max() for model in (alone, mended))
    assert after < before / 100
    without, with_it = gain_db(small, corrected, original, calls, run)
    assert with_it > without


def test_blocks_are_layers_that_belong_together() -> None:
    names = ["unet.conv_in/Conv", "unet.up.0.resnets.1.conv1/Conv", "unet.up.0.attentions.0.proj_in/MatMul", "unet.up.0.resnets.1.conv2/Conv"]
    assert blocks(names) == {"unet.conv_in": names[:1], "unet.up.0.resnets.1": [names[1], names[3]], "unet.up.0.attentions.0": [names[2]]}


def test_mixed_precision_follows_the_scan_within_the_budget(original: onnx.ModelProto, tmp_path: Path) -> None:
    """All blocks back give the float graph; none back, int8; a budget for one takes the most harmful for its bytes that fits."""
    record = quantize_unet(tmp_path / "unet.onnx", tmp_path / "int8.onnx", feeds(), ExportSettings(scan_rows=0, float_layers=()))
    assert record["int8_layers"] == 3 and record["scan"] == [] and record["float_blocks"] == []
    quantized = onnx.load(tmp_path / "int8.onnx")
    nodes = [node.name for node in original.graph.node if node.op_type in ("Conv", "Gemm")]
    assert psnr(original, with_float(quantized, original, set(nodes))) > 90
    assert psnr(original, with_float(quantized, original, set())) < 60

    ranked = scan(quantized, original, nodes, feeds(), run)
    assert {item["block"] for item in ranked} == {"unet.down.resnets.0", "unet.down.resnets.1", "unet.head"}
    sizes = {item["block"]: item["bytes"] for item in ranked}
    assert sizes == {"unet.down.resnets.0": 9 * WIDTH**2, "unet.down.resnets.1": WIDTH**2, "unet.head": WIDTH**2}
    assert min(ranked, key=lambda item: item["psnr_db"])["block"] == "unet.down.resnets.1"

    def mixed(spare_bytes: int, target: float = 199.0) -> tuple[list[str], float]:
        return mix(quantized, original, ranked, nodes, feeds(), run, psnr_target_db=target, spare_bytes=spare_bytes)[1:]

    none, one, every = mixed(WIDTH**2 - 1), mixed(WIDTH**2), mixed(11 * WIDTH**2)
    assert none[0] == [] and one[0] == ["unet.down.resnets.1"] and set(every[0]) == set(sizes)
    assert none[1] < one[1] < every[1]
    assert mixed(11 * WIDTH**2, target=one[1])[0] == one[0]


def test_int8_guard_against_saturation(bundle: Path) -> None:
    """The careful kernels are never worse than the plain ones, and on AVX2 without VNNI they are far better."""
    runner = Runner(bundle, "int8")
    calls = []
    noise = runner.initial_noise([1, 2])
    hidden, mask = runner.encode_prompts(["a red circle", "a blue square"])
    Runner(bundle).denoise(noise, np.zeros_like(noise), hidden, mask, lambda _i, feed: calls.append(feed))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    float_unet = onnxruntime.InferenceSession(str(bundle / "unet.onnx"), options)
    plain_unet = onnxruntime.InferenceSession(str(bundle / "unet_int8.onnx"), options)
    truth = np.stack([float_unet.run(None, feed)[0] for feed in calls])
    careful = np.abs(np.stack([runner.run_graph("unet", feed) for feed in calls]) - truth).mean()
    plain = np.abs(np.stack([plain_unet.run(None, feed)[0] for feed in calls]) - truth).mean()
    assert runner.manifest["variants"]["int8"]["session_options"] == {"session.x64quantprecision": "1"}
    assert careful <= plain * 1.05
    flags = runner.manifest["machine"]["cpu_flags"]
    if "avx2" in flags and not any("vnni" in flag for flag in flags):
        assert careful * 2 < plain  # the trap is real on this machine


def test_float_layers_stay_float(bundle: Path, tmp_path: Path) -> None:
    graph = onnx.load(bundle / "unet_int8.onnx").graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    quantized = {node.name for node in graph.node if node.op_type in ("Conv", "MatMul", "Gemm") and makers.get(node.input[0]) == "DequantizeLinear"}
    assert not any(layer in name for name in quantized for layer in ("conv_in", "conv_out", "time_embedding", "add_embedding"))
    assert any("conv1.pointwise" in name for name in quantized) and any("attn1.to_q" in name for name in quantized)
    with pytest.raises(ValueError, match="float_layers"):
        quantize_unet(bundle / "unet.onnx", tmp_path / "x.onnx", feeds(), ExportSettings(float_layers=("unet",)))
