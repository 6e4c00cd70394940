"""The encoder's packed weights: what MLX makes of them, what is lost, and what `verify` finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from tests.trainers.export.conftest import calibration_rows
from trainers.conditioning import (
    EDIT_PROMPT,
    EDIT_TEMPLATE,
    GENERATE_PROMPT,
    GENERATE_TEMPLATE,
    PromptEncoder,
    encoder_image,
    hidden_states,
)
from trainers.export import encoder_weights
from trainers.export.bundle import export_bundle
from trainers.export.encoder_weights import load_packed, pack, unpack, write_encoder
from trainers.export.runner import Runner
from trainers.export.samples import difference, load_samples
from trainers.export.settings import ExportSettings
from trainers.export.verify import check_bundle, read_manifest


def a_weight(rows: int = 24, columns: int = 256) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight[0, :64] = 0  # a group without any value
    weight[1, :64] = weight[1, :64].abs() + 3  # and one far from zero
    return weight


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (4, 32), (8, 128)])
def test_a_value_moves_by_half_a_step_at_most_and_zero_stays(bits: int, group: int) -> None:
    weight = a_weight()
    found = pack("layer", weight, bits, group, torch.float32)
    restored = unpack(found["layer.weight"], found["layer.scales"], found["layer.biases"], bits)
    step = found["layer.scales"].abs().repeat_interleave(group, 1)
    # The far end and zero are kept exactly, which stretches the steps: a value at the near end may be a whole one away.
    assert ((restored - weight).abs() <= step * 1.01).all()
    assert ((restored - weight).abs() <= step * 0.501).float().mean() > 0.98
    assert restored[0, :64].abs().max() <= 1e-6
    assert found["layer.weight"].dtype == torch.uint32 and found["layer.weight"].shape == (24, 256 * bits // 32)


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 32)])
def test_mlx_reads_what_we_pack_and_packs_the_same(bits: int, group: int) -> None:
    mlx = pytest.importorskip("mlx.core", reason="pip install 'mlx[cpu]' compares packed encoder weights with MLX's own")
    weight = a_weight()
    ours = {name.split(".")[1]: mlx.array(value.numpy()) for name, value in pack("layer", weight, bits, group, torch.float32).items()}
    read = np.array(mlx.dequantize(ours["weight"], ours["scales"], ours["biases"], group_size=group, bits=bits))
    words, scales, biases = (torch.from_numpy(np.array(ours[part])) for part in ("weight", "scales", "biases"))
    np.testing.assert_allclose(read, unpack(words, scales, biases, bits).numpy(), rtol=1e-6, atol=1e-6)
    theirs = mlx.quantize(mlx.array(weight.numpy()), group_size=group, bits=bits)
    np.testing.assert_allclose(np.array(ours["scales"]), np.array(theirs[1]), rtol=1e-5, atol=1e-7)
    assert (np.array(ours["weight"]) == np.array(theirs[0])).mean() > 0.99


def test_the_packed_encoder_stands_in_for_the_float_one(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_weights, "FILE_BYTES", 20_000)  # several files
    monkeypatch.setattr(encoder_weights, "CHUNK_ROWS", 7)
    record = write_encoder(checkpoint, tmp_path / "packed", 8, 32)
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 2
    index = json.loads((tmp_path / "packed" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: path.name for path in (tmp_path / "packed").glob("*.safetensors") for name in load_file(path)} == index
    model = Qwen3VLForConditionalGeneration.from_pretrained(checkpoint / "text_encoder", dtype=torch.float32)
    before = {name: value.clone() for name, value in model.named_parameters()}
    load_packed(model, tmp_path / "packed", 8)
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    for name, value in model.named_parameters():
        assert torch.allclose(value, before[name], atol=0.02 * float(before[name].detach().abs().max())), name
    packed = [name for name in index if name.endswith(".scales")]
    assert record["layers"] == len(packed) > 10 and {name.removesuffix(".scales") + ".weight" for name in packed} <= set(changed)
    assert not any(name.startswith("lm_head") for name in index)
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["quantization"] == {"group_size": 32, "bits": 8}


def test_mlx_vlm_gives_the_states_of_torch_for_both_tasks(checkpoint: Path, tmp_path: Path) -> None:
    """The model of another library, from our folder alone, beside the stock class with the values that the packed ones stand for."""
    mlx = pytest.importorskip("mlx.core", reason="pip install 'mlx[cpu]' runs the packed encoder in MLX")
    loading = pytest.importorskip("mlx_vlm.utils", reason="pip install --no-deps mlx-vlm runs the packed encoder in MLX")
    write_encoder(checkpoint, tmp_path / "packed", 4, 32)
    encoder = PromptEncoder.load(checkpoint, "post_norm")
    load_packed(encoder.text_encoder, tmp_path / "packed", 4)
    model = loading.load_model(tmp_path / "packed")
    language = model.language_model

    text = GENERATE_TEMPLATE.replace("{}", GENERATE_PROMPT.format("a red circle"))
    ids = encoder.tokenizer([text], return_tensors="pt")["input_ids"]
    states = hidden_states(encoder.text_encoder, ids, torch.ones_like(ids), "post_norm")
    found = language.model(mlx.array(ids.numpy()))
    assert difference(states.numpy(), np.array(found.astype(mlx.float32)))["psnr_db"] > 50

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    pictures = encoder.processor.image_processor([encoder_image(picture)], return_tensors="pt")
    tokens = int(pictures["image_grid_thw"].prod()) // encoder.processor.image_processor.merge_size**2
    text = EDIT_TEMPLATE.replace("<|image_pad|>", "<|image_pad|>" * tokens).replace("{}", EDIT_PROMPT.format("a blue circle"))
    ids = encoder.tokenizer([text], return_tensors="pt")["input_ids"]
    vision = dict(pictures) | {"mm_token_type_ids": (ids == encoder.processor.image_token_id).long()}
    states = hidden_states(encoder.text_encoder, ids, torch.ones_like(ids), "post_norm", **vision)
    grid = mlx.array(pictures["image_grid_thw"].numpy())
    seen = model.get_input_embeddings(mlx.array(ids.numpy()), mlx.array(pictures["pixel_values"].numpy()), image_grid_thw=grid)
    found = language.model(
        None, inputs_embeds=seen.inputs_embeds, position_ids=language.get_rope_index(mlx.array(ids.numpy()), grid)[0],
        visual_pos_masks=seen.visual_pos_masks, deepstack_visual_embeds=seen.deepstack_visual_embeds,
    )  # fmt: skip
    assert difference(states.numpy(), np.array(found.astype(mlx.float32)))["psnr_db"] > 50


def test_weights_that_no_group_divides_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiples of 128 values"):
        write_encoder(checkpoint, tmp_path / "packed", 4, 128)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = ExportSettings(
        sequence_tokens=64, calibration_rows=1, parity_rows=2, variants=("fp32",), text_encoder=False, encoder_bits=8, encoder_block_values=32
    )  # fmt: skip
    return Path(export_bundle(checkpoint, settings, tmp_path_factory.mktemp("packed"), calibration=calibration_rows(3))["bundle"])


@pytest.mark.thorough
def test_a_bundle_without_an_encoder_graph_carries_its_weights_and_what_they_lose(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    weights = manifest["encoder"]["weights"]
    assert not manifest["encoder"]["exported"] and weights["bits"] == 8
    for task in ("generate", "edit"):
        assert 30 < weights["states"][task]["psnr_db"] < 90, weights
        assert 30 < weights["latents"][task]["psnr_db"] < 120, weights
    assert "holds its weights in 8 bits" in (bundle / "LOOP.md").read_text()
    assert all(check.ok for check in check_bundle(bundle, manifest))


@pytest.mark.thorough
def test_the_runner_takes_the_states_of_an_encoder_that_runs_elsewhere(bundle: Path) -> None:
    runner = Runner(bundle)
    for group in load_samples(bundle):
        given = (group.arrays["hidden_states"], group.arrays["mask"])
        inputs = (group.texts, group.seeds) if group.task == "generate" else (group.sources, group.texts, group.seeds)
        call = runner.generate if group.task == "generate" else runner.edit
        assert np.abs(call(*inputs, hidden_states=given).astype(int) - group.arrays["images"].astype(int)).max() <= 1
        with pytest.raises(ValueError, match="stays external.*pass hidden_states"):
            call(*inputs)


@pytest.mark.thorough
def test_a_packed_weight_of_another_shape_is_named(bundle: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(bundle, tmp_path / "broken"))
    (path,) = (broken / "text_encoder").glob("*.safetensors")
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.endswith("q_proj.scales"))
    save_file(tensors | {name: tensors[name][:, :-1].contiguous() if tensors[name].shape[1] > 1 else tensors[name][:-1].contiguous()}, path)
    problems = {check.what: check.problem for check in check_bundle(broken, read_manifest(broken)) if not check.ok}
    assert "was changed" in problems["sha256"] and "q_proj" in problems["weights"]
