"""ONNX Runtime sessions of graphs that an export looks at: on one thread, without advice, optimised or exactly as written.
The runner, which ships in the bundle and stands alone, makes its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import onnx
import onnxruntime


def session(
    graph: onnx.ModelProto | Path, *, as_written: bool = False, entries: Mapping[str, str] = MappingProxyType({})
) -> onnxruntime.InferenceSession:
    """A session of a graph in memory or in a file. as_written: nothing is fused. entries: configuration of the session."""
    options = onnxruntime.SessionOptions()
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    given = str(graph) if isinstance(graph, Path) else graph.SerializeToString()
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
