"""Checkpoints load from both layouts and both file types; what does not fit is named, key by key.
Prompt strings are the published ones, byte for byte."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dreamlite_data.rewards import RewardCheckpointError, load_reward
from dreamlite_data.rewards.loader import network_key, released_key
from dreamlite_data.rewards.spec import released_spec

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 2e-5


def copy_of(name: str, to: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / name, to / name))


def score(model_dir: Path) -> float:
    return float(load_reward(model_dir).score([Image.open(FIXTURES / "image0.png")], ["a cat"]).mu[0])


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("hpsv3", {"0393599dad45a971903d1d62a3acf9bad3ccccdafa7f40f680523419e1f68b7a"}),
        (
            "editreward",
            {
                "da5bfc26898cc8e0e534a29675ad78c3462d331b7feaebf13bae5aa50195864f",
                "89bbc5c2ac1bbea9c45a0fde298e9a97d1c079170a30780392c577fc1cd8d286",
            },
        ),
    ],
)
def test_prompt_strings_are_the_published_ones(kind, texts):
    spec = released_spec(kind)
    assert {hashlib.sha256(text.encode()).hexdigest() for text in spec["prompts"]} == texts
    suffix = hashlib.sha256(spec["suffix"].encode()).hexdigest()
    assert suffix == "2471faca094ae5bd6fe17b71dce20c3d7583625545e235889f7e74e7eeb69d0a"


def test_nested_and_flat_layout_and_pth_load_to_the_same_score(tmp_path):
    flat = copy_of("hpsv3_tiny", tmp_path)
    wanted = score(flat)
    state = load_file(flat / "HPSv3.safetensors")
    nested = {
        key if key.startswith(("rm_head", "lm_head"))
        else f"model.{key}" if key.startswith("visual.")
        else key.replace("model.", "model.language_model.", 1): value
        for key, value in state.items()
    }  # fmt: skip
    (flat / "HPSv3.safetensors").unlink()
    save_file(nested, flat / "model.safetensors")
    assert score(flat) == pytest.approx(wanted, abs=TOLERANCE)
    (flat / "model.safetensors").unlink()
    torch.save({"model": state}, flat / "model.pth")
    assert score(flat) == pytest.approx(wanted, abs=TOLERANCE)


@pytest.mark.parametrize(("kind", "name"), [("hpsv3", "hpsv3_tiny/HPSv3"), ("editreward", "editreward_tiny/model")])
def test_layout_maps_are_inverse(kind, name):
    for key in load_file(FIXTURES / f"{name}.safetensors"):
        if key != "lm_head.weight":
            assert released_key(network_key(key), kind=kind) == key


def test_missing_unexpected_and_misshapen_keys_are_listed(tmp_path):
    broken = copy_of("hpsv3_tiny", tmp_path)
    state = load_file(broken / "HPSv3.safetensors")
    state["rm_head.9.extra"] = torch.zeros(1)
    del state["model.norm.weight"]
    state["visual.merger.mlp.0.bias"] = torch.zeros(5)
    save_file(state, broken / "HPSv3.safetensors")
    with pytest.raises(RewardCheckpointError) as caught:
        load_reward(broken)
    message = str(caught.value)
    assert "1 missing: backbone.language_model.norm.weight" in message
    assert "1 unexpected: rm_head.9.extra" in message
    assert "visual.merger.mlp.0.bias (5,) instead of (128,)" in message


def test_vocabulary_comes_from_the_weights_and_must_fit_the_tokenizer(tmp_path):
    model = load_reward(FIXTURES / "hpsv3_tiny")  # its config says 320, its embedding has 276 rows
    assert model.network.backbone.get_input_embeddings().weight.shape[0] == 276
    short = copy_of("hpsv3_tiny", tmp_path)
    state = load_file(short / "HPSv3.safetensors")
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:270].contiguous()
    save_file(state, short / "HPSv3.safetensors")
    with pytest.raises(RewardCheckpointError, match="276 tokens .* 270 embedding rows"):
        load_reward(short)


def test_a_number_of_heads_that_is_not_the_kind_s_is_refused(tmp_path):
    """A single-head EditReward was trained with other prompts; scoring it with these two would be wrong in silence."""
    own = copy_of("editreward_tiny", tmp_path)
    state = load_file(own / "model.safetensors")
    save_file({key: value for key, value in state.items() if not key.startswith("rm_heads.head_1")}, own / "model.safetensors")
    with pytest.raises(RewardCheckpointError, match="1 reward heads, but its kind 'editreward' has 2"):
        load_reward(own)


def test_a_head_of_another_depth_is_refused(tmp_path):
    own = copy_of("hpsv3_tiny", tmp_path)
    state = load_file(own / "HPSv3.safetensors")
    save_file({key: value for key, value in state.items() if not key.startswith("rm_head.5")}, own / "HPSv3.safetensors")
    with pytest.raises(RewardCheckpointError, match="3 linear layers, here one has 2"):
        load_reward(own)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "no config of a known model"), ("config.json", '{"model_type": "bert"}', "no reward backbone for 'bert'"),
        ("tokenizer.json", "{", "no tokenizer can be read"), ("reward_spec.json", "[]", "must hold an object"),
        ("reward_spec.json", "{", "no valid JSON"),
    ],
)  # fmt: skip
def test_a_damaged_file_beside_the_weights_is_named(tmp_path, name, content, message):
    own = copy_of("hpsv3_tiny", tmp_path)
    (own / name).write_text(content)
    with pytest.raises(RewardCheckpointError, match=message):
        load_reward(own)


def test_code_that_a_directory_brings_is_not_run(tmp_path):
    own = copy_of("hpsv3_tiny", tmp_path)
    (own / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name, field in (("config.json", {"AutoConfig": "own.A"}), ("tokenizer_config.json", {"AutoTokenizer": ["own.A", "own.A"]})):
        settings = json.loads((own / name).read_text())
        (own / name).write_text(json.dumps(settings | {"auto_map": field}))
    load_reward(own)
    assert not (tmp_path / "ran").exists()


def test_heads_stay_float32_beside_a_bfloat16_backbone():
    model = load_reward(FIXTURES / "hpsv3_tiny", dtype=torch.bfloat16)
    assert model.network.backbone.dtype == torch.bfloat16
    assert model.network.heads[0][0].weight.dtype == torch.float32
    scores = model.score([Image.open(FIXTURES / "image0.png")], ["a cat"])
    assert abs(scores.mu[0] - score(FIXTURES / "hpsv3_tiny")) < 0.5
    assert model.scorer_id != load_reward(FIXTURES / "hpsv3_tiny").scorer_id


def test_a_directory_overrides_prompt_and_pixel_budget(tmp_path):
    own = copy_of("hpsv3_tiny", tmp_path)
    default = load_reward(own)
    (own / "reward_spec.json").write_text(
        json.dumps({"prompts": ["{text_prompt}"], "suffix": "\n<|Reward|>", "min_px": 3136, "max_px": 3136})
    )
    model = load_reward(own)
    assert model.scorer_id != default.scorer_id
    assert np.prod(model.packer.pixels(Image.new("RGB", (500, 500))).shape[:2]) == 3136
    (ids,) = model.tokenizer.branches(["x"])[0]
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"promts": ["{text_prompt}"]}, "did you mean 'prompts'"),
        ({"prompts": ["no field"]}, "exactly once"),
        ({"suffix": "no token"}, "exactly once"),
        ({"heads": ["a", "b"]}, "one prompt per head"),
        ({"min_px": 10, "max_px": 5}, "greater than max_px"),
        ({"kind": "clip"}, "known kinds"),
    ],
)
def test_a_wrong_spec_is_refused_with_the_way_to_mend_it(tmp_path, fields, message):
    own = copy_of("hpsv3_tiny", tmp_path)
    (own / "reward_spec.json").write_text(json.dumps(fields))
    with pytest.raises(RewardCheckpointError, match=message):
        load_reward(own)


def test_a_directory_without_weights_or_with_two_is_refused(tmp_path):
    with pytest.raises(RewardCheckpointError, match="not a directory"):
        load_reward(tmp_path / "nothing")
    own = copy_of("hpsv3_tiny", tmp_path)
    shutil.copy(own / "HPSv3.safetensors", own / "model.safetensors")
    with pytest.raises(RewardCheckpointError, match="several weight files"):
        load_reward(own)
    for path in own.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(RewardCheckpointError, match="no .safetensors"):
        load_reward(own)
