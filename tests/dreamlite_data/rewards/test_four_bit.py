"""4-bit loading quantises the decoder's matrices and nothing else, and its only effect is that of the quantisation.
Runs on the CPU, whose kernels bitsandbytes has too; on a GPU it is untested."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dreamlite_data.rewards import RewardCheckpointError, RewardModel, load_reward
from dreamlite_data.rewards.plan import loaded_bytes
from dreamlite_data.rewards.stored import read_headers, weight_files

pytest.importorskip("bitsandbytes")
FIXTURES = Path(__file__).parent / "fixtures"
IMAGES, PROMPTS = [Image.open(FIXTURES / f"image{index}.png") for index in range(3)], ["a cat", "x", "the quick brown fox"]


@pytest.fixture(scope="module")
def quantised(short_hpsv3_dir) -> RewardModel:
    return load_reward(short_hpsv3_dir, dtype=torch.bfloat16, four_bit=True)


def test_only_the_decoder_s_matrices_are_quantised(quantised):
    network = quantised.network
    assert {parameter.dtype for parameter in network.backbone.visual.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in network.heads.parameters()} == {torch.float32}
    assert network.backbone.get_input_embeddings().weight.dtype == torch.bfloat16
    for layer in network.backbone.language_model.layers:
        kinds = {name.rpartition(".")[2]: type(module).__name__ for name, module in layer.named_modules() if "proj" in name}
        assert set(kinds.values()) == {"Linear4bit"} and len(kinds) == 7
        assert layer.mlp.up_proj.weight.dtype == torch.uint8 and layer.input_layernorm.weight.dtype == torch.bfloat16


def test_memory_is_what_the_plan_says(quantised):
    held = 0
    for parameter in quantised.network.parameters():
        held += parameter.nbytes
        if state := getattr(parameter, "quant_state", None):
            held += state.absmax.nbytes + state.state2.absmax.nbytes
    planned = loaded_bytes(read_headers(weight_files(quantised.model_dir)), four_bit=True)
    assert held == pytest.approx(planned, rel=0.01)  # the scales of a matrix round up to whole blocks


def test_a_score_differs_by_the_quantisation_alone(quantised, short_hpsv3_dir):
    from bitsandbytes.functional import dequantize_4bit

    plain = load_reward(short_hpsv3_dir, dtype=torch.bfloat16)
    before = plain.score(IMAGES, PROMPTS).mu
    for name, layer in quantised.network.named_modules():
        if type(layer).__name__ == "Linear4bit":
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.network.get_submodule(name).weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
    found = quantised.score(IMAGES, PROMPTS).mu
    np.testing.assert_allclose(found, plain.score(IMAGES, PROMPTS).mu, atol=0.1)
    assert np.abs(found - before).max() > 0.3  # these weights are random and 32 wide: much is lost
    assert quantised.scorer_id != plain.scorer_id


def test_gradient_passes_through_quantised_layers(quantised):
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantised.differentiable(images, PROMPTS[:2]).sum().backward()
    assert (images.grad.flatten(1).abs().amax(1) > 0).all()


def test_without_bitsandbytes_the_error_says_what_to_install(short_hpsv3_dir, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RewardCheckpointError, match=r"pip install 'dreamlite-pipeline\[four-bit\]'"):
        load_reward(short_hpsv3_dir, four_bit=True)
