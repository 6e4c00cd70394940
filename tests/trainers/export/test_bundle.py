"""The exported graphs compute what torch computes, and a damaged or contradictory bundle is refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dreamlite_data import scenes
from flows.cli import app
from tests.trainers.export.conftest import calibration_rows, export_again
from trainers.conditioning import SquareImageProcessor
from trainers.export.bundle import export_bundle
from trainers.export.loop_page import describe_loop
from trainers.export.rerun import inspect_bundle
from trainers.export.runner import Runner
from trainers.export.settings import ExportSettings
from trainers.export.verify import verify_bundle

PARTS = {"text_encoder", "edit_encoder", "vae_encoder", "vae_decoder", "unet_generate", "unet_edit"}


def test_float_graphs_equal_torch(exported: dict[str, Any]) -> None:
    parity = exported["parity"]
    floats = {name.removesuffix("_fp32"): value for name, value in parity["graphs"].items() if name.endswith("_fp32")}
    assert set(floats) == PARTS
    assert all(value["max_abs"] < 1e-4 for value in floats.values()), floats
    assert all(parity["end_to_end"][f"{task}_fp32"]["max_abs"] < 1e-4 for task in ("generate", "edit"))


LATENT_DB = {"fp16": 60, "int8": 35, "int4": 30}  # export.md 3.5; int4 with an int4 encoder of random weights


@pytest.mark.parametrize("variant", LATENT_DB)
def test_a_variant_is_smaller_and_close(exported: dict[str, Any], variant: str) -> None:
    parity, sizes = exported["parity"], exported["variants"]
    assert {name.removesuffix(f"_{variant}") for name in parity["graphs"] if name.endswith(f"_{variant}")} == PARTS
    assert sizes[variant] < sizes["fp32"] * 0.75
    for task in ("generate", "edit"):
        assert parity["end_to_end"][f"{task}_{variant}"]["psnr_db"] > LATENT_DB[variant]
        assert parity["end_to_end"][f"{task}_{variant}"]["psnr_db"] < parity["end_to_end"][f"{task}_fp32"]["psnr_db"]


def test_calibration_is_recorded(exported: dict[str, Any], bundle: Path) -> None:
    """Every row's id, both tasks, all deployed sigmas, none of the rows that parity is measured on."""
    record = exported["quantization"]["unet_int8"]["calibration"]
    assert np.allclose(record["timesteps"], [1000 * sigma for sigma in _sigmas(exported)[:-1]], atol=1e-2)
    assert record["disjoint_from_parity"] and record["rows"] == 4
    written = json.loads((bundle / "calibration.json").read_text())
    used, measured = ({row["id"] for row in written[key]} for key in ("rows", "parity_rows"))
    assert len(used) == 4 and not used & measured
    assert {row["task"] for row in written["rows"]} == {"generate", "edit"}
    assert written["sigmas"] == _sigmas(exported)[:-1]


def test_manifest_keeps_its_own_schema(bundle: Path) -> None:
    """As a reader in another language would check it; a field too many, too few or of another type is refused."""
    schema = json.loads((bundle / "manifest.schema.json").read_text())
    manifest = json.loads((bundle / "manifest.json").read_text())
    jsonschema.validate(manifest, schema)
    for change in ({"sampler": {}}, {"sigma": []}, {"artifact_id": "short"}, {"variants": {"int8": {"files": ["unet.onnx"]}}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(manifest | change, schema)


def test_the_page_about_the_loop_holds_the_numbers(bundle: Path) -> None:
    manifest, page = json.loads((bundle / "manifest.json").read_text()), (bundle / "LOOP.md").read_text()
    for sigma in manifest["sampler"]["sigmas"]:
        assert f"{sigma:.8g}" in page
    assert manifest["prompts"]["edit_prompt"] in page and "first 64 positions" in page
    assert all(f"`{port}`" in page for graph in manifest["graphs"].values() for port in graph["inputs"])
    manifest["sampler"]["sigmas"][1] = 0.123
    assert "0.123" in describe_loop(manifest) and "0.123" not in page


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
def test_two_exports_in_one_process_or_two_are_the_same_bytes(
    checkpoint: Path, exported: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of the second export, whose graphs are traced here one after the other, and its id."""
    monkeypatch.setattr("trainers.export.parts.processors", lambda: 1)
    again = export_again(checkpoint, tmp_path)
    files = [json.loads((Path(answer["bundle"]) / "manifest.json").read_text())["files"] for answer in (exported, again)]
    assert files[0] == files[1]
    assert again["artifact_id"] == exported["artifact_id"] and again["digest"] == exported["digest"]


def test_graph_files_hold_no_paths_or_traces(bundle: Path) -> None:
    for path in bundle.glob("*.onnx"):
        data = path.read_bytes()
        for trace in (b"site-packages", b"stack_trace", b".py", str(Path.cwd()).encode()):
            assert trace not in data, (path.name, trace)
        model = onnx.load(path)
        # Per-group scales in opset 18, per-channel from 21 on: whoever fuses GroupNorm must raise the opset first.
        assert not any(node.op_type == "GroupNormalization" for node in model.graph.node)
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_verify_reruns_every_variant(bundle: Path) -> None:
    """Parity of each graph, latents and images of both tasks, seconds of each part; nothing fails on the machine of the export."""
    checks = inspect_bundle(bundle)
    assert [check.problem for check in checks if not check.ok] == []
    done = {(check.part, check.what) for check in checks}
    for variant in ("fp32", "fp16", "int8", "int4"):
        assert {(f"{part} {variant}", "graph") for part in PARTS} <= done
        for task in ("generate", "edit"):
            assert {(f"{task} {variant}", "latents after all steps"), (f"{task} {variant}", "images")} <= done
        assert (f"unet, all steps {variant}", "seconds") in done


def test_manifest_states_the_facts_of_the_checkpoint(bundle: Path) -> None:
    manifest = verify_bundle(bundle)
    assert manifest["encoder"]["hidden_state"] == "post_norm"
    assert manifest["prompts"]["generate_drop_tokens"] == 34
    assert manifest["prompts"]["edit_drop_tokens"] == 64
    assert manifest["lineage"] == {"checkpoint_id": "dmd2-test"}


def test_a_graph_that_computes_something_else_is_found(bundle: Path, tmp_path: Path) -> None:
    """Right hash, right ports, one weight moved: only running it can tell."""
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    model = onnx.load(copy / "vae_decoder.onnx")
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(2), weight.name))
    onnx.save(model, copy / "vae_decoder.onnx")
    entry = {"bytes": 0, "sha256": hashlib.sha256((copy / "vae_decoder.onnx").read_bytes()).hexdigest()}
    _break_manifest(copy, lambda m: (m["files"]["vae_decoder.onnx"].update(entry), [m["variants"].pop(name) for name in ("fp16", "int8", "int4")]))
    verify_bundle(copy)
    failed = [check.part for check in inspect_bundle(copy) if not check.ok]
    assert failed == ["vae_decoder fp32", "generate fp32", "edit fp32"]


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
        (lambda d: _break_manifest(d, lambda m: m["encoder"].pop("hidden_state")), "encoder.hidden_state"),
        (lambda d: _break_manifest(d, lambda m: m["graphs"]["unet"]["outputs"].clear()), "unet.onnx has ports"),
    ],
)
def test_verify_names_what_is_bad(bundle: Path, tmp_path: Path, damage: Any, names: str) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    damage(copy)
    with pytest.raises(ValueError, match=names):
        verify_bundle(copy)


def test_the_command_verify_answers_with_a_table_and_an_exit_code(bundle: Path, tmp_path: Path) -> None:
    """0 for a whole bundle, 1 with the name of every bad file, 2 for what is no bundle."""
    whole = CliRunner().invoke(app, ["verify", str(bundle), "--static"])
    assert whole.exit_code == 0 and "unet_int4.onnx" in whole.output and "FAILED" not in whole.output
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    (copy / "runner.py").write_text("print('mine')")
    (copy / "LOOP.md").unlink()
    bad = CliRunner().invoke(app, ["verify", str(copy), "--static"])
    assert bad.exit_code == 1 and bad.output.count("FAILED") == 2
    assert "runner.py has sha256" in bad.output and "LOOP.md is missing" in bad.output
    assert CliRunner().invoke(app, ["verify", str(tmp_path), "--static"]).exit_code == 2


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


def test_float_is_always_among_the_variants() -> None:
    for wrong in (("int8",), ("fp32", "int8", "int8")):
        with pytest.raises(ValueError, match="name each once and keep fp32"):
            ExportSettings(variants=wrong)


def test_unknown_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'sequence_tokens'"):
        ExportSettings(sequence_token=3)


@pytest.mark.thorough
def test_a_bundle_from_released_weights_carries_their_licence(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "derived")
    path = tmp_path / "derived" / "dreamlite.json"
    weights = {"origin": "carlofkl/DreamLite-base@0", "licence": "CC-BY-NC-4.0", "derived_from_release": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": weights}))
    settings = ExportSettings(sequence_tokens=64, calibration_rows=1, parity_rows=1, variants=("fp32",), text_encoder=False)
    answer = export_bundle(tmp_path / "derived", settings, tmp_path / "out", calibration=calibration_rows(2))
    licences = json.loads((Path(answer["bundle"]) / "manifest.json").read_text())["licences"]
    assert (licences["weights"], licences["derived_from_release"], licences["non_commercial"]) == ("CC-BY-NC-4.0", True, True)
    assert "CC-BY-NC-4.0" in (Path(answer["bundle"]) / "README.md").read_text()
