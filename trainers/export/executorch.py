"""ExecuTorch programs of a bundle's parts: lowered to XNNPACK in float or static int8, and run by the wheel's own runtime.
The `executorch` extra brings compiler and runtime; nothing here is imported without it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import fx, nn
from torch.fx.traceback import NodeSource

from trainers.export.prepare import Part
from trainers.export.quiet import quiet
from trainers.export.sensitivity import Feed

MAX_DELEGATES = 6
"""Each hand-over to XNNPACK and back copies its tensors. A UNet whose norms stay outside has hundreds, a prepared one 4."""


@dataclass(frozen=True)
class Lowered:
    """A program as bytes; `delegates` counts its calls of XNNPACK, `outside` the operators left to portable kernels, by name."""

    program: bytes
    delegates: int
    outside: dict[str, int]


def lower(
    part: Part, feeds: Sequence[Feed] = (), float_layers: Sequence[str] = (), max_delegates: int | None = MAX_DELEGATES
) -> Lowered:
    """Compile `part`, prepared with batch 1 and `delegable`, for XNNPACK.

    feeds: inputs of any batch to calibrate int8 on; without them the program is fp32. float_layers: layers whose path
    contains one of these stay float. ValueError where the graph falls into more than max_delegates pieces (None: any number).
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    example = tuple(part.inputs.values())
    with quiet(), _shared_provenance(), torch.no_grad():
        exported = torch.export.export(part.module.eval(), example, strict=False)
        if feeds:
            calibrated = _quantize(exported.module(), list(part.inputs), feeds, float_layers)
            exported = torch.export.export(calibrated, example, strict=False)
        edge = to_edge_transform_and_lower(
            exported, partitioner=[XnnpackPartitioner()], compile_config=EdgeCompileConfig(_check_ir_validity=False)
        )
        delegates, outside = _count(edge.exported_program().graph_module)
        if max_delegates is not None and delegates > max_delegates:
            raise ValueError(
                f"{part.output} falls into {delegates} XNNPACK delegates, at most {max_delegates} are worth it; outside stayed "
                f"{outside}. Prepare the part with delegable=True, or rewrite these operators in trainers/export/rewrites.py."
            )
        return Lowered(bytes(edge.to_executorch().buffer), delegates, outside)


class Program:
    """A program file in ExecuTorch's runtime; calling it takes arrays by input name and any batch, and returns the output."""

    def __init__(self, path: Path, inputs: Sequence[str]) -> None:
        """inputs: their names in the program's order, from the manifest. ValueError when the runtime refuses the file."""
        from executorch.runtime import Runtime

        self.inputs = list(inputs)
        try:
            # The method reads its weights from the program, which therefore has to stay.
            self._program = Runtime.get().load_program(Path(path))
            self._method = self._program.load_method("forward")
        except RuntimeError as error:
            raise ValueError(f"{path} does not load in ExecuTorch's runtime ({error}).") from None
        metadata = self._method.metadata
        self.shapes = {name: list(metadata.input_tensor_meta(index).sizes()) for index, name in enumerate(self.inputs)}

    def __call__(self, feed: Feed) -> np.ndarray:
        """(B, ...), row by row, for the program's own batch is 1."""
        tensors = [torch.from_numpy(np.ascontiguousarray(feed[name])) for name in self.inputs]
        rows = [self._method.execute([tensor[row : row + 1].clone() for tensor in tensors])[0] for row in range(len(tensors[0]))]
        return torch.cat(rows).numpy()


def _quantize(model: fx.GraphModule, inputs: Sequence[str], feeds: Sequence[Feed], float_layers: Sequence[str]) -> nn.Module:
    """Static int8 of linear layers and convolutions: weights per output channel, activations per tensor."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = get_symmetric_quantization_config(is_per_channel=True)
    quantizer = XNNPACKQuantizer().set_filter_function(_outside_of(float_layers))
    for operator in (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default):
        quantizer.set_operator_type(operator, config)
    model = prepare_pt2e(model, quantizer)
    for feed in feeds:
        tensors = [torch.from_numpy(feed[name]) for name in inputs]
        for row in range(len(tensors[0])):
            model(*(tensor[row : row + 1] for tensor in tensors))
    return convert_pt2e(model)


def _outside_of(float_layers: Sequence[str]) -> Callable[[fx.Node], bool]:
    def chosen(node: fx.Node) -> bool:
        layers = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        layer = layers[-1] if layers else ""
        # The averages inside rewritten norms are linear layers too; in 8 bits they alone cost 15 dB.
        return not layer.endswith(".average") and not any(part in layer for part in float_layers)

    return chosen


def _count(module: fx.GraphModule) -> tuple[int, dict[str, int]]:
    delegates, outside = 0, {}
    for node in module.graph.nodes:
        name = getattr(node.target, "__name__", str(node.target))
        if node.op != "call_function" or name == "getitem":
            continue
        if "call_delegate" in str(node.target):
            delegates += 1
        else:
            outside[name] = outside.get(name, 0) + 1
    return delegates, dict(sorted(outside.items()))


@contextlib.contextmanager
def _shared_provenance() -> Iterator[None]:
    """Let copied nodes share the record of where they come from.

    Each of the compiler's passes makes that record longer, and it is copied whole for each node of each delegate: lowering
    a UNet of 1.5 M parameters then takes minutes more (pass `from_node` in torch.fx.traceback). Records are never changed.
    """
    NodeSource.__deepcopy__ = lambda self, _memo: self
    try:
        yield
    finally:
        del NodeSource.__deepcopy__
