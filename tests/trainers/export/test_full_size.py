"""The measurement of the full-size export, on a network small enough for a test: the same functions, in this process.
What only the full size can show (bytes against their limits) is the command's own work, `dreamlite export-size`."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper

from tests.trainers.export.conftest import tiny_unet
from trainers.export import full_size
from trainers.export.weights import drop_unused

pytestmark = pytest.mark.thorough  # tracing takes half a minute


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float graph, its three smaller forms and the call that they answer."""
    target = tmp_path_factory.mktemp("full_size")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_size, "_official", lambda size_px: tiny_unet().eval())
        patch.setattr(full_size, "TEXT_WIDTH", 32)
        full_size._export_unet(target, 64)
    for variant in ("fp16", "int8", "int4"):
        full_size._shrink_unet(target, variant)
    return target


def test_every_form_is_smaller_and_near_torch(folder: Path) -> None:
    sizes = {}
    for variant, least in full_size.LEAST_DB.items():
        path = folder / ("unet.onnx" if variant == "fp32" else f"unet_{variant}.onnx")
        # Small layers have less to average rounding over than large ones: 34.7 dB in int4, where the full size has more.
        assert full_size._call_unet(folder, path, variant)["psnr_db"] >= least - 3, variant
        sizes[variant] = path.stat().st_size
    assert sizes["int4"] < sizes["int8"] < sizes["fp16"] < sizes["fp32"]


def test_a_wrong_or_large_graph_is_not_ok(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / "unet.onnx")
    largest = max(model.graph.initializer, key=lambda tensor: tensor.ByteSize())
    largest.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(largest), largest.name))
    onnx.save(model, tmp_path / "unet.onnx")
    took = {"seconds": 1.0, "cpu_seconds": 1.0, "peak_mb": 1.0}
    for path, limit, good in ((folder / "unet.onnx", 1565.0, True), (folder / "unet.onnx", 0.1, False), (tmp_path / "unet.onnx", 1565.0, False)):
        call = took | full_size._call_unet(folder, path, "fp32")
        assert full_size._row(path, "unet", "fp32", limit, took, call)["ok"] is good


def test_a_process_that_the_system_ends_is_named() -> None:
    """os.kill is what the kernel does to it when memory runs out."""
    with pytest.raises(ValueError, match="'unet int8' was ended from outside"):
        full_size._alone(lambda _line: None, "unet int8", _end_this_process)


def _end_this_process() -> dict[str, float]:
    os.kill(os.getpid(), 9)
    return {}


def test_constants_that_no_node_reads_go_and_the_others_keep_their_order() -> None:
    read = [onnx.helper.make_node("Add", ["b", "d"], ["sum"])]
    constants = [onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [1], [0.0]) for name in "abcde"]
    output = onnx.helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, [1])
    model = onnx.helper.make_model(onnx.helper.make_graph(read, "small", [], [output], constants))
    drop_unused(model)
    assert [tensor.name for tensor in model.graph.initializer] == ["b", "d"]
