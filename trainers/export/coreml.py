"""Core ML packages of a bundle's parts: converted, compressed, made repeatable, and checked as far as Linux can.
Core ML itself runs only on Apple's systems, so what is checked is the file: ports, operators, and every weight read back."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from trainers.export.prepare import Part
from trainers.export.quiet import quiet

Weights = Literal["fp16", "int8", "palette6", "palette4"]

SPECIFICATION_VERSION = 9
"""iOS 18, the first with scaled dot-product attention and per-channel scales (coremltools, "What's New")."""

COMPRESSED_ABOVE_VALUES = 2048
"""Weights of so many values and smaller ones stay fp16, as in coremltools' own default; they are no share of the size."""

ALLOWED_OPERATORS = frozenset({
    "add", "batch_norm", "cast", "clip", "concat", "const", "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense", "conv", "cos",
    "expand_dims", "gather", "gelu", "greater_equal", "instance_norm", "layer_norm", "linear", "logical_and", "matmul", "mul", "pow",
    "real_div", "reduce_mean", "relu", "reshape", "rsqrt", "scaled_dot_product_attention", "select", "sigmoid", "silu", "sin",
    "slice_by_index", "softmax", "split", "sqrt", "square", "squeeze", "stack", "sub", "tanh", "tile", "transpose",
    "upsample_nearest_neighbor",
})  # fmt: skip
"""Operators that every compute unit's compiler takes with static shapes; no loop, no list, no random number, no dynamic shape."""

_MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
_BLOB = Path("Data/com.apple.CoreML/weights/weight.bin")
_KINDS = {"float32": 65568, "float16": 65552, "int32": 131104}
"""ArrayFeatureType.ArrayDataType of coremltools' FeatureTypes.proto."""


@dataclass(frozen=True)
class Converted:
    """An MLModel, and of each parameter that its graph reads the path in the torch module with the name in the graph."""

    model: Any
    parameters: dict[str, str]


def convert(part: Part) -> Converted:
    """`part`, prepared with batch 1, in fp16 with ports named as in the part. Integer inputs become int32."""
    import coremltools

    with _quiet(), torch.no_grad():
        exported = torch.export.export(part.module.eval(), (), kwargs=part.inputs, strict=False).run_decompositions({})
        read = {node.name for node in exported.graph.nodes if node.op == "placeholder" and node.users}
        model = coremltools.convert(
            exported,
            outputs=[coremltools.TensorType(name=part.output, dtype=np.float32)],
            minimum_deployment_target=coremltools.target.iOS18,
            compute_precision=coremltools.precision.FLOAT16,
            skip_model_load=True,
        )
    names = exported.graph_signature.inputs_to_parameters
    return Converted(model, {path: name for name, path in names.items() if name in read})


def compress(model: Any, weights: Weights) -> Any:
    """`model` with weights in int8 (symmetric, a scale per output channel) or in palettes of 2^6 or 2^4 values a tensor (k-means)."""
    from coremltools.optimize import coreml

    if weights == "fp16":
        return model
    with _quiet():
        if weights == "int8":
            chosen = coreml.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", weight_threshold=COMPRESSED_ABOVE_VALUES)
            return coreml.linear_quantize_weights(model, coreml.OptimizationConfig(global_config=chosen))
        chosen = coreml.OpPalettizerConfig(mode="kmeans", nbits=_bits(weights), weight_threshold=COMPRESSED_ABOVE_VALUES)
        return coreml.palettize_weights(model, coreml.OptimizationConfig(global_config=chosen))


def save_package(model: Any, path: Path) -> None:
    """Write `model` to `path` (.mlpackage) so that equal models are equal bytes.

    coremltools writes the day of conversion, random identifiers and a debugging table; none is read by Core ML's compiler.
    """
    from coremltools.proto import Model_pb2

    shutil.rmtree(path, ignore_errors=True)
    with _quiet():
        model.save(str(path))
    for extra in path.glob("executorch_debug_handle_mapping.json"):
        extra.unlink()
    specification = Model_pb2.Model.FromString((path / _MODEL).read_bytes())
    specification.description.metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    (path / _MODEL).write_bytes(specification.SerializeToString(deterministic=True))
    (path / _MODEL).chmod(0o644)

    manifest = json.loads((path / "Manifest.json").read_text())
    names = {old: str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"])) for old, entry in manifest["itemInfoEntries"].items()}
    manifest["itemInfoEntries"] = {names[old]: entry for old, entry in manifest["itemInfoEntries"].items()}
    manifest["rootModelIdentifier"] = names[manifest["rootModelIdentifier"]]
    (path / "Manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def check_package(path: Path, ports: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Operators of the package by name and number; ValueError where it is not what the manifest says.

    ports: {'inputs' | 'outputs': {name: {'dtype', 'shape'}}}. Also checked: the version of the specification, operators that
    are not in ALLOWED_OPERATORS, and weights that point outside the package.
    """
    import coremltools

    for file in ("Manifest.json", _MODEL, _BLOB):
        if not (path / file).is_file():
            raise ValueError(f"{path / file} is missing; copy the whole package directory.")
    specification = coremltools.utils.load_spec(str(path))
    if specification.specificationVersion != SPECIFICATION_VERSION:
        raise ValueError(f"{path} has specification version {specification.specificationVersion}, not {SPECIFICATION_VERSION} (iOS 18).")
    found = {"inputs": _ports(specification.description.input), "outputs": _ports(specification.description.output)}
    for side, wanted in ports.items():
        if found[side] != wanted:
            raise ValueError(f"{path} has {side} {found[side]}, the manifest says {wanted}.")
    operators: dict[str, int] = {}
    for function in specification.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for operation in block.operations:
                operators[operation.type] = operators.get(operation.type, 0) + 1
                for value in operation.attributes.values():
                    if value.HasField("blobFileValue") and value.blobFileValue.fileName != "@model_path/weights/weight.bin":
                        raise ValueError(f"{path} reads weights from {value.blobFileValue.fileName}; only its own file may be read.")
    strange = sorted(set(operators) - ALLOWED_OPERATORS)
    if strange:
        raise ValueError(f"{path} uses {', '.join(strange)}, which are not in ALLOWED_OPERATORS of trainers/export/coreml.py.")
    return dict(sorted(operators.items()))


def port_table(part: Part, output: torch.Tensor) -> dict[str, dict[str, Any]]:
    """What `check_package` expects of `part`'s package; `output` is what the part returns."""

    def port(value: torch.Tensor) -> dict[str, Any]:
        return {"dtype": "float32" if value.is_floating_point() else "int32", "shape": list(value.shape)}

    return {"inputs": {name: port(value) for name, value in part.inputs.items()}, "outputs": {part.output: port(output)}}


def check_weights(
    path: Path, part: Part, names: dict[str, str], weights: Weights
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read every weight back from the package and compare it with `part`'s; ValueError where one is off its bound.

    names: `Converted.parameters`. Bounds: fp16 half a unit in the last place; int8 half a step of the channel's scale (itself in fp16); a palette no further
    than its nearest entry, and no more entries than its bits allow. Returns a record (number of weights found, share of all
    values found and share compressed, largest error as a share of its bound) and the weights found, by name in the module.
    """
    import coremltools
    from coremltools.optimize import coreml

    with _quiet():
        model = coremltools.models.MLModel(str(path), skip_model_load=True)
        if weights != "fp16":
            model = coreml.decompress_weights(model)
        constants = coreml.get_weights_metadata(model, weight_threshold=1)
    stored = {name.split("_to_fp16")[0]: np.asarray(item.val, np.float32) for name, item in constants.items()}
    found, worst, compressed = {}, 0.0, 0
    parameters = {name: part.module.get_parameter(name) for name in names}
    for name, parameter in parameters.items():
        value = stored.get(names[name])
        if value is None or value.size != parameter.numel():
            continue
        truth, value = parameter.detach().numpy(), value.reshape(parameter.shape)
        form = weights if value.size > COMPRESSED_ABOVE_VALUES and value.ndim > 1 else "fp16"
        worst = max(worst, _excess(name, truth, value, form))
        compressed += value.size if form != "fp16" else 0
        found[name] = torch.from_numpy(value.copy())
    total = sum(parameter.numel() for parameter in parameters.values())
    record = {
        "weights": len(found),
        "value_share": round(sum(value.numel() for value in found.values()) / total, 4),
        "compressed_share": round(compressed / total, 4),
        "error_of_bound": round(worst, 4),
    }
    return record, found


def _excess(name: str, truth: np.ndarray, value: np.ndarray, weights: Weights) -> float:
    """Largest error of one weight as a share of its bound."""
    half = np.abs(truth) * 2.0**-11 + 2.0**-25
    if weights == "fp16":
        bound = half
    elif weights == "int8":
        axes = tuple(range(1, truth.ndim))
        steps = value / np.maximum(np.abs(value).max(axis=axes, keepdims=True) / 127, 1e-12)
        if np.abs(steps - steps.round()).max() > 127 * 2.0**-10:
            raise ValueError(f"Core ML weight {name} does not lie on 8-bit steps of its channels' scales.")
        step = np.abs(truth).max(axis=axes, keepdims=True) / 127
        bound = np.broadcast_to(step * (0.5 + 127 * 2.0**-11) + half, truth.shape)
    else:
        palette = np.unique(value)
        if len(palette) > 2 ** _bits(weights):
            raise ValueError(f"Core ML weight {name} has {len(palette)} values, a {weights} holds {2 ** _bits(weights)}.")
        right = np.minimum(np.searchsorted(palette, truth), len(palette) - 1)
        left = np.maximum(right - 1, 0)
        nearest = np.minimum(np.abs(truth - palette[left]), np.abs(truth - palette[right]))
        # Entries and weights are both fp16 when the nearest is chosen.
        bound = nearest + 2 * (np.abs(truth).max() * 2.0**-11) + 2.0**-24
    share = float((np.abs(truth - value) / bound).max())
    if not share <= 1:
        raise ValueError(f"Core ML weight {name} is {share:.2f} times as far from the checkpoint as {weights} explains.")
    return share


def _bits(weights: Weights) -> int:
    return int(weights.removeprefix("palette"))


def _ports(features: Any) -> dict[str, dict[str, Any]]:
    kinds = {number: name for name, number in _KINDS.items()}
    return {
        feature.name: {
            "dtype": kinds.get(feature.type.multiArrayType.dataType, "unknown"),
            "shape": list(feature.type.multiArrayType.shape),
        }
        for feature in features
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and without the notice that this torch is newer than the one coremltools was tested with."""
    with quiet("coremltools"), contextlib.redirect_stderr(io.StringIO()):
        yield
