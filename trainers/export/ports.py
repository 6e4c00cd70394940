"""Names, types and shapes of what an ONNX file takes and gives.
Read from the graph alone: weights stay on disk where the format keeps them apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx


def read_ports(path: Path) -> dict[str, Any]:
    """{'inputs': {name: {dtype, shape}}, 'outputs': ...} of a graph file; the free batch axis is written 'batch'."""
    model = onnx.load(path, load_external_data=False)
    kinds = onnx.TensorProto.DataType

    def ports(values: Sequence[Any]) -> dict[str, Any]:
        return {
            value.name: {
                "dtype": kinds.Name(value.type.tensor_type.elem_type).lower(),
                "shape": [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim],
            }
            for value in values
        }

    return {"inputs": ports(model.graph.input), "outputs": ports(model.graph.output)}
