"""ExecuTorch programs compute what torch computes, Core ML packages hold its weights, and both are repeatable and checked.
What needs an extra is skipped without it; the refusals and the bounds on weights are tested everywhere."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DreamLiteUNetModel
from torch import nn

from tests.trainers.export.conftest import SETTINGS, build_checkpoint, calibration_rows, tiny_unet
from trainers.export import target_checks
from trainers.export.bundle import export_bundle
from trainers.export.coreml import _excess, check_package, check_weights, compress, convert, port_table, save_package
from trainers.export.executorch import Program, lower
from trainers.export.prepare import UNET_INPUTS, Part, UNetGraph, VaeDecoderGraph
from trainers.export.rerun import inspect_bundle
from trainers.export.rewrites import AveragedGroupNorm
from trainers.export.samples import difference
from trainers.export.settings import ExportSettings
from trainers.export.target_checks import check_targets, require_targets
from trainers.export.verify import verify_bundle


def needs(target: str) -> pytest.MarkDecorator:
    missing = target_checks.missing_packages(target)
    return pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed; pip install -e '.[{target}]'")


def decoder(width: int = 16) -> Part:
    torch.manual_seed(0)
    blocks, depths = (width,) * 4, (1,) * 4
    vae = AutoencoderTiny(
        encoder_block_out_channels=blocks, decoder_block_out_channels=blocks, num_encoder_blocks=depths, num_decoder_blocks=depths
    )
    return Part(VaeDecoderGraph(vae), {"latent": torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))}, "image")


def unet_part(*, delegable: bool) -> Part:
    torch.manual_seed(0)
    noise = torch.Generator().manual_seed(1)
    mask = torch.ones(1, 16, dtype=torch.int64)
    mask[:, 11:] = 0
    sample, states = torch.randn(1, 4, 8, 16, generator=noise), torch.randn(1, 16, 32, generator=noise)
    inputs = (sample, torch.full((1,), 500.0), states, mask, torch.full((1, 2), 64.0))
    return Part(UNetGraph(tiny_unet(), delegable=delegable).eval(), dict(zip(UNET_INPUTS, inputs, strict=True)), "velocity")


def answer(part: Part) -> np.ndarray:
    with torch.no_grad():
        return part.module(**part.inputs).numpy()


def feed(part: Part) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in part.inputs.items()}


# --- without any extra ------------------------------------------------------------------------------------------------


def test_a_missing_extra_stops_the_export_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "coremltools" else find(name, *rest))
    require_targets(["onnxruntime"])
    settings = SETTINGS.model_copy(update={"targets": ("onnxruntime", "coreml")})
    with pytest.raises(ValueError, match=r"'coreml', but coremltools cannot be imported; pip install .*\.\[coreml\]"):
        export_bundle(checkpoint, settings, tmp_path, calibration=calibration_rows(1))
    assert not list(tmp_path.iterdir())


def test_onnxruntime_is_always_a_target() -> None:
    assert ExportSettings().targets == ("onnxruntime",)
    with pytest.raises(ValueError, match="lacks 'onnxruntime'"):
        ExportSettings(targets=("coreml",))


def test_what_cannot_be_checked_is_said_and_what_is_not_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_checks, "missing_packages", lambda target: ["coremltools"])
    entry = {"file": "coreml/unet_fp16.mlpackage"}
    manifest = {"files": {"coreml/unet_fp16.mlpackage/Manifest.json": {}}, "targets": {"coreml": {"files": {"unet_fp16": entry}}}}
    (check,) = check_targets(tmp_path, manifest)
    assert check.ok and check.result == "not checked" and "coremltools" in check.value
    entry["file"] = "../elsewhere.mlpackage"
    assert "none of its files" in list(check_targets(tmp_path, manifest))[-1].problem
    (check,) = check_targets(tmp_path, {"files": {}, "targets": {"qnn": {"files": {}}}})
    assert "target 'qnn'" in check.problem


@pytest.mark.parametrize("weights", ["fp16", "int8", "palette6"])
def test_weights_are_held_to_the_bound_of_their_form(weights: Any) -> None:
    """Rounding as the form rounds passes, a nudge or a coarser form does not."""
    truth = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    scale = np.abs(truth).max(axis=1, keepdims=True) / 127
    palette = np.sort(np.random.default_rng(1).choice(truth.ravel(), 64, replace=False))
    nearest = palette[np.abs(truth[..., None] - palette).argmin(-1)]
    forms = {"fp16": truth.astype(np.float16).astype(np.float32), "int8": (truth / scale).round() * scale, "palette6": nearest}
    assert _excess("w", truth, forms[weights], weights) <= 1
    nudged = forms[weights].copy()
    nudged[3, 5] = nudged[2, 2] if weights == "palette6" else nudged[3, 5] + 2 * scale[3, 0]
    with pytest.raises(ValueError, match="Core ML weight w"):
        _excess("w", truth, nudged, weights)
    coarser = {"fp16": "int8", "int8": "palette6", "palette6": "fp16"}[weights]
    with pytest.raises(ValueError, match="Core ML weight w"):
        _excess("w", truth, forms[coarser], weights)


# --- ExecuTorch -------------------------------------------------------------------------------------------------------


@needs("executorch")
def test_program_equals_torch_and_equal_parts_are_equal_bytes(tmp_path: Path) -> None:
    part = decoder()
    lowered, again = lower(part), lower(decoder())
    assert lowered.program == again.program and lowered.delegates <= 6
    assert b"site-packages" not in lowered.program and b".py" not in lowered.program
    (tmp_path / "decoder.pte").write_bytes(lowered.program)
    program = Program(tmp_path / "decoder.pte", list(part.inputs))
    assert program.shapes == {"latent": [1, 4, 4, 4]}
    assert np.abs(program(feed(part)) - answer(part)).max() < 1e-5
    pair = {"latent": np.concatenate([feed(part)["latent"], np.zeros((1, 4, 4, 4), np.float32)])}
    assert np.array_equal(program(pair)[:1], program(feed(part)))
    (tmp_path / "decoder.pte").write_bytes(b"not a program at all")
    with pytest.raises(ValueError, match=r"decoder\.pte does not load"):
        Program(tmp_path / "decoder.pte", ["latent"])


@needs("executorch")
def test_a_graph_in_too_many_pieces_is_refused() -> None:
    """Stock norms cut the graph; averaged ones do not (the UNet below)."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(8, 8), nn.LayerNorm(8))]
    with pytest.raises(ValueError, match="8 XNNPACK delegates.*native_layer_norm"):
        lower(Part(nn.Sequential(*layers), {"states": torch.zeros(1, 4, 8)}, "states"))


class Block(nn.Module):
    """What a UNet is made of, in small: convolutions around a norm, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.norm, self.conv = nn.Conv2d(4, 32, 3, padding=1), AveragedGroupNorm(nn.GroupNorm(4, 32)), nn.Conv2d(32, 32, 3, padding=1)
        self.out = nn.Linear(32, 32)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.out(self.conv(nn.functional.silu(self.norm(self.conv_in(states)))).permute(0, 2, 3, 1))


@needs("executorch")
def test_int8_program_is_smaller_close_and_calibrated(tmp_path: Path) -> None:
    """Negative control: ranges from inputs a hundred times too small cut the activations off."""
    torch.manual_seed(0)
    part = Part(Block(), {"states": torch.randn(1, 4, 8, 8)}, "states")
    feeds = [{"states": np.random.default_rng(seed).standard_normal((2, 4, 8, 8)).astype(np.float32)} for seed in range(2)]
    small = [{"states": item["states"] * 0.01} for item in feeds]
    found = {}
    for form, given in (("fp32", []), ("int8", feeds), ("cut", small)):
        lowered = lower(part, given, ("conv_in",))
        (tmp_path / f"{form}.pte").write_bytes(lowered.program)
        found[form] = (len(lowered.program), difference(answer(part), Program(tmp_path / f"{form}.pte", ["states"])(feed(part)))["psnr_db"])
    assert found["int8"][0] < 0.75 * found["fp32"][0]
    assert found["fp32"][1] > 120 and 35 < found["int8"][1] < 70 and found["cut"][1] < found["int8"][1] - 10, found


@needs("executorch")
@pytest.mark.thorough
def test_unet_programs(tmp_path: Path) -> None:
    part = unet_part(delegable=True)
    sizes = {}
    for form, feeds in (("fp32", []), ("int8", [feed(part)])):
        lowered = lower(part, feeds, ("conv_in", "conv_out", "time_embedding", "add_embedding"))
        assert lowered.delegates <= 6, lowered.outside
        (tmp_path / f"{form}.pte").write_bytes(lowered.program)
        sizes[form] = len(lowered.program)
        error = np.abs(Program(tmp_path / f"{form}.pte", UNET_INPUTS)(feed(part)) - answer(part))
        if form == "fp32":
            assert error.max() < 1e-5
        else:
            assert 1e-5 < error.max() and 20 * np.log10(np.ptp(answer(part)) / np.sqrt((error**2).mean())) > 35
    assert sizes["int8"] < sizes["fp32"]


# --- Core ML ----------------------------------------------------------------------------------------------------------


@needs("coreml")
def test_package_is_repeatable_and_what_it_says(tmp_path: Path) -> None:
    part, raw = decoder(), []
    for name in ("one", "two"):
        converted = convert(decoder())
        save_package(converted.model, tmp_path / f"{name}.mlpackage")
        converted.model.save(str(tmp_path / f"{name}_raw.mlpackage"))
        raw.append((tmp_path / f"{name}_raw.mlpackage" / "Manifest.json").read_bytes())
    assert raw[0] != raw[1]  # what normalising is for
    one, two = ({file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}
                for root in (tmp_path / "one.mlpackage", tmp_path / "two.mlpackage"))  # fmt: skip
    assert one == two and len(one) == 3
    assert not any(b"site-packages" in data or b".py" in data for data in one.values())

    ports = port_table(part, torch.from_numpy(answer(part)))
    assert check_package(tmp_path / "one.mlpackage", ports)["upsample_nearest_neighbor"] == 3
    wrong = ports | {"inputs": {"latent": {"dtype": "float32", "shape": [1, 4, 8, 4]}}}
    with pytest.raises(ValueError, match="the manifest says"):
        check_package(tmp_path / "one.mlpackage", wrong)
    record, weights = check_weights(tmp_path / "one.mlpackage", part, converted.parameters, "fp16")
    assert record["value_share"] > 0.95 and len(weights) == record["weights"]
    other = decoder()
    with torch.no_grad():
        next(other.module.vae.decoder.parameters())[0, 0, 0, 0] += 0.01
    with pytest.raises(ValueError, match="as far from the checkpoint"):
        check_weights(tmp_path / "one.mlpackage", other, converted.parameters, "fp16")


@needs("coreml")
def test_compressed_packages_are_smaller_and_in_bounds(tmp_path: Path) -> None:
    part, sizes = decoder(), {}
    converted = convert(part)
    for weights in ("fp16", "int8", "palette4"):
        path = tmp_path / f"{weights}.mlpackage"
        save_package(compress(converted.model, weights), path)
        check_package(path, port_table(part, torch.from_numpy(answer(part))))
        record, _ = check_weights(path, part, converted.parameters, weights)
        assert (record["compressed_share"] > 0.8) == (weights != "fp16")
        sizes[weights] = (path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    assert sizes["palette4"] < sizes["int8"] < sizes["fp16"]
    with pytest.raises(ValueError, match="Core ML weight"):
        check_weights(tmp_path / "fp16.mlpackage", part, converted.parameters, "int8")


# --- the bundle -------------------------------------------------------------------------------------------------------


@needs("coreml")
@needs("executorch")
@pytest.mark.thorough
def test_bundle_with_all_targets(tmp_path: Path) -> None:
    """A UNet of one level, without encoders, for lowering takes a minute of processor time for each three transformers."""
    checkpoint = build_checkpoint(tmp_path / "checkpoint")
    shutil.rmtree(checkpoint / "unet")
    config = dict(tiny_unet().config) | {
        "block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
        "transformer_layers_per_block": (1,), "attention_head_dim": (2,),
    }  # fmt: skip
    unet = DreamLiteUNetModel(**{key: value for key, value in config.items() if not key.startswith("_")})
    unet.save_pretrained(checkpoint / "unet")
    chosen = {"targets": ("onnxruntime", "coreml", "executorch"), "coreml_weights": (), "variants": ("fp32", "int8"), "text_encoder": False}
    made = export_bundle(checkpoint, SETTINGS.model_copy(update=chosen), tmp_path, calibration=calibration_rows(2))
    bundle = Path(made["bundle"])
    manifest = verify_bundle(bundle)
    checks = inspect_bundle(bundle)
    assert all(check.ok for check in checks), [check.problem for check in checks]
    parts = {check.part for check in checks}
    assert {"unet_generate executorch_fp32", "edit executorch_int8", "executorch vae_decoder_fp32", "coreml unet_fp16"} <= parts
    programs, packages = manifest["targets"]["executorch"], manifest["targets"]["coreml"]
    assert programs["verified_runtime"] and packages["verified_runtime"] is None
    assert all(value["max_abs"] < 1e-4 for value in programs["parity"]["fp32"]["graphs"].values())
    assert all(value["psnr_db"] > 35 for value in programs["parity"]["int8"]["latents"].values())
    assert packages["files"]["unet_fp16"]["torch_with_stored_weights"]["psnr_db"] > 60

    for name in (programs["files"]["unet_int8"]["file"], packages["files"]["unet_fp16"]["file"] + "/Data/com.apple.CoreML/model.mlmodel"):
        data = (bundle / name).read_bytes()
        (bundle / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(ValueError, match=Path(name).name):
            verify_bundle(bundle)
        (bundle / name).write_bytes(data)
    # int8 in the place of fp32: the hashes agree, the numbers do not.
    programs["files"]["unet_fp32"]["file"] = programs["files"]["unet_int8"]["file"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert any("executorch_fp32 comes out" in check.problem for check in inspect_bundle(bundle))
