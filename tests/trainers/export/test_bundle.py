"""The exported graphs compute what torch computes, and a damaged or contradictory bundle is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from dreamlite_data import scenes
from tests.trainers.export.conftest import calibration_rows
from trainers.conditioning import SquareImageProcessor
from trainers.export.bundle import export_bundle
from trainers.export.parity import TorchReference
from trainers.export.parts import GRAPHS, write_graphs
from trainers.export.runner import Runner
from trainers.export.settings import ExportSettings
from trainers.export.source import read_source
from trainers.export.verify import verify_bundle


def test_float_graphs_equal_torch(exported: dict[str, Any]) -> None:
    parity = exported["parity"]
    floats = {name: value for name, value in parity["graphs"].items() if "int8" not in name}
    assert {"text_encoder", "edit_encoder", "vae_encoder", "vae_decoder", "unet_fp32_generate", "unet_fp32_edit"} == set(floats)
    assert all(value["max_abs"] < 1e-4 for value in floats.values()), floats
    assert all(parity["end_to_end"][f"{task}_fp32"]["max_abs"] < 1e-4 for task in ("generate", "edit"))


def test_int8_is_smaller_and_close(exported: dict[str, Any]) -> None:
    assert exported["sizes"]["unet_int8.onnx"] < exported["sizes"]["unet.onnx"]
    for task in ("generate", "edit"):
        assert exported["parity"]["end_to_end"][f"{task}_int8"]["psnr_db"] > 35  # Apple's abort line for diffusion models
    record = exported["quantization"]
    assert np.allclose(record["calibration"]["timesteps"], [1000 * sigma for sigma in _sigmas(exported)[:-1]], atol=1e-2)
    assert record["calibration"]["disjoint_from_parity"]


def _sigmas(exported: dict[str, Any]) -> list[float]:
    return json.loads((Path(exported["bundle"]) / "manifest.json").read_text())["sampler"]["sigmas"]


@pytest.mark.parametrize("task", ["generate", "edit"])
def test_runner_equals_stock_pipeline(checkpoint: Path, bundle: Path, task: str) -> None:
    """Negative control: the same run with the panels' order swapped is far off."""
    from diffusers import DreamLiteMobilePipeline
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint / "tokenizer")
    processor = SquareImageProcessor(Qwen2VLImageProcessorPil.from_pretrained(checkpoint / "processor"), tokenizer)
    pipeline = DreamLiteMobilePipeline.from_pretrained(checkpoint, processor=processor)
    pipeline.set_progress_bar_config(disable=True)
    scene = scenes.sample_scene(np.random.default_rng(5))
    image = Image.fromarray(scenes.render(scene)) if task == "edit" else None
    text = "a red circle" if task == "generate" else "make the circle blue"
    generator = torch.Generator().manual_seed(3)
    expected = pipeline(prompt=text, image=image, height=64, width=64, generator=generator, output_type="latent").images.numpy()

    runner = Runner(bundle)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)).numpy()
    if task == "generate":
        condition, (hidden, mask) = np.zeros_like(noise), runner.encode_prompts([text])
    else:
        condition, (hidden, mask) = runner.encode_images([image]), runner.encode_edits([image], [text])
    latents = runner.denoise(noise, condition, hidden, mask)
    assert np.abs(latents - expected).max() < 1e-4
    swapped = runner.denoise(condition, noise, hidden, mask)
    assert np.abs(swapped - expected).max() > 0.1


@pytest.mark.thorough
def test_graphs_traced_in_one_process_or_two_are_the_same_bytes(
    checkpoint: Path, bundle: Path, tmp_path: Path, small_export: tuple
) -> None:
    settings = small_export[0]
    source = read_source(checkpoint, settings.steps)
    write_graphs(source, TorchReference(source, settings.steps), settings, tmp_path, processes=1)
    for name in GRAPHS:
        assert (tmp_path / f"{name}.onnx").read_bytes() == (bundle / f"{name}.onnx").read_bytes(), name
    assert (tmp_path / "unet.onnx").read_bytes() != (bundle / "unet_int8.onnx").read_bytes()


def test_graph_files_hold_no_paths_or_traces(bundle: Path) -> None:
    for path in bundle.glob("*.onnx"):
        data = path.read_bytes()
        for trace in (b"site-packages", b"stack_trace", b".py", str(Path.cwd()).encode()):
            assert trace not in data, (path.name, trace)
        model = onnx.load(path)
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_verify_accepts_and_reproduces(bundle: Path) -> None:
    manifest = verify_bundle(bundle, reproduce=True)
    assert manifest["encoder"]["hidden_state"] == "post_norm"
    assert manifest["prompts"]["generate_drop_tokens"] == 34
    assert manifest["prompts"]["edit_drop_tokens"] == 64
    assert manifest["lineage"] == {"checkpoint_id": "dmd2-test"}


def _break_manifest(folder: Path, change: Any) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda d: (d / "unet_int8.onnx").write_bytes((d / "unet_int8.onnx").read_bytes()[:-1] + b"\0"), "unet_int8.onnx"),
        (lambda d: (d / "tokenizer" / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda d: (d / "extra.bin").write_bytes(b"x"), "extra.bin"),
        (lambda d: _break_manifest(d, lambda m: m["sampler"]["sigmas"].__setitem__(1, 0.9)), "sigmas"),
        (lambda d: _break_manifest(d, lambda m: m["sampler"]["scheduler"].__setitem__("max_shift", 1.5)), "sigmas"),
        (lambda d: _break_manifest(d, lambda m: m["shapes"].__setitem__("sequence_tokens", 65)), "encoder.onnx takes input_ids"),
        (lambda d: _break_manifest(d, lambda m: m["prompts"].__setitem__("edit_drop_tokens", 63)), "edit_encoder.onnx"),
        (lambda d: _break_manifest(d, lambda m: m.__setitem__("schema_version", 99)), "schema version"),
    ],
)
def test_verify_names_what_is_bad(bundle: Path, tmp_path: Path, damage: Any, names: str) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    verify_bundle(copy)
    damage(copy)
    with pytest.raises(ValueError, match=names):
        verify_bundle(copy)


@pytest.mark.parametrize(
    ("key", "value", "names"),
    [("hidden_state", "middle", "hidden_state"), ("encoder_image_px", 128, "encoder_image_px"), ("size_px", 60, "size_px"),
     ("distilled_steps", None, "never distilled"), ("distilled_steps", 8, "distilled for 8 steps")],
)
def test_contradicting_checkpoint_is_refused(checkpoint: Path, tmp_path: Path, small_export: tuple, key: str, value: Any, names: str) -> None:
    settings, rows = small_export
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    facts = json.loads((copy / "dreamlite.json").read_text())
    (copy / "dreamlite.json").write_text(json.dumps(facts | {key: value}))
    with pytest.raises(ValueError, match=names):
        export_bundle(copy, settings, tmp_path / "out", calibration=rows)
    assert not (tmp_path / "out" / "bundle").exists()


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([], "calibration"),
        ([{"task": "paint", "text": "x"}], "row 0"),
        ([{"task": "generate", "text": "x"}, {"task": "edit", "text": "y"}], "row 1"),
    ],
)
def test_bad_calibration_rows_are_named(checkpoint: Path, tmp_path: Path, small_export: tuple, rows: list[dict[str, Any]], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        export_bundle(checkpoint, small_export[0], tmp_path, calibration=rows)


def test_release_licence_is_inherited() -> None:
    with pytest.raises(ValueError, match="CC-BY-NC-4.0"):
        ExportSettings(derived_from_release=True)
    assert ExportSettings(derived_from_release=True, weights_licence="CC-BY-NC-4.0").derived_from_release


def test_unknown_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'sequence_tokens'"):
        ExportSettings(sequence_token=3)


@pytest.mark.thorough
def test_a_bundle_from_released_weights_carries_their_licence(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "derived")
    path = tmp_path / "derived" / "dreamlite.json"
    weights = {"origin": "carlofkl/DreamLite-base@0", "licence": "CC-BY-NC-4.0", "derived_from_release": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": weights}))
    settings = ExportSettings(sequence_tokens=64, calibration_rows=1, parity_rows=1, quantize=False, text_encoder=False)
    answer = export_bundle(tmp_path / "derived", settings, tmp_path / "out", calibration=calibration_rows(2))
    licences = json.loads((Path(answer["bundle"]) / "manifest.json").read_text())["licences"]
    assert (licences["weights"], licences["derived_from_release"], licences["non_commercial"]) == ("CC-BY-NC-4.0", True, True)
    assert "CC-BY-NC-4.0" in (Path(answer["bundle"]) / "README.md").read_text()
