"""A released checkpoint comes in with its facts and its licence, and what is not whole, not safe or not ours is one sentence.
The licence goes on to the bundle."""

import json
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from tests.dreamlite_data.rewards.hub_server import COMMIT, hub_server
from tests.trainers.released import CARD, write_release
from trainers.export.settings import ExportSettings
from trainers.export.source import read_source
from trainers.inference import Sampler
from trainers.model import load_unet
from trainers.settings import ModelSettings, StartSettings
from trainers.stages import follow_checkpoint
from trainers.start import find_checkpoint, import_checkpoint


@pytest.fixture(scope="module")
def release(components, tmp_path_factory):
    return write_release(components, tmp_path_factory.mktemp("release") / "base")


@pytest.fixture
def own(release, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(release, tmp_path / "own")


def start(folder, **settings):
    return StartSettings(checkpoint=str(folder), **settings)


def test_facts_are_derived_and_the_checkpoint_draws(release, tmp_path):
    facts = import_checkpoint(start(release), tmp_path / "checkpoint")
    assert (facts["hidden_state"], facts["size_px"], facts["drop_generate"], facts["drop_edit"]) == ("pre_norm", 64, 34, 64)
    assert facts["weights"] == {"origin": str(release), "licence": "CC-BY-NC-4.0", "derived_from_release": True}
    assert (tmp_path / "checkpoint/unet").is_symlink(), "5 GB are linked, not copied"
    sampler = Sampler.load(tmp_path / "checkpoint")
    assert sampler.encoder.hidden_state == "pre_norm"
    drawn = sampler.generate(["a red circle"], [1], steps=2, guidance_scale=2.0)
    other = Sampler.load(tmp_path / "checkpoint")
    other.encoder.hidden_state = "post_norm"
    assert not np.array_equal(drawn, other.generate(["a red circle"], [1], steps=2, guidance_scale=2.0)), "the two states differ"
    wanted, found = load_unet(release).state_dict(), sampler.unet.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_settings_choose_what_the_checkpoint_leaves_open(release, tmp_path):
    facts = import_checkpoint(start(release, hidden_state="post_norm", size_px=32), tmp_path / "a")
    assert (facts["hidden_state"], facts["size_px"]) == ("post_norm", 32)
    followed = follow_checkpoint(tmp_path / "a", ModelSettings())
    assert (followed.hidden_state, followed.size_px) == ("post_norm", 32)
    with pytest.raises(ValueError, match="model.size_px is 64"):
        follow_checkpoint(tmp_path / "a", ModelSettings(size_px=64))
    again = import_checkpoint(start(tmp_path / "a"), tmp_path / "b")  # now it is said
    assert (again["hidden_state"], again["size_px"], again["weights"]) == ("post_norm", 32, facts["weights"])
    with pytest.raises(ValueError, match="start.hidden_state is pre_norm"):
        import_checkpoint(start(tmp_path / "a", hidden_state="pre_norm"), tmp_path / "c")
    with pytest.raises(ValueError, match="multiples of 16 px"):
        import_checkpoint(start(release, size_px=40), tmp_path / "d")


def test_the_licence_is_the_checkpoints_and_reaches_the_bundle(release, own, checkpoints, tmp_path):
    import_checkpoint(start(release), tmp_path / "released")
    carried = ExportSettings().carrying(read_source(tmp_path / "released").weights)
    assert (carried.weights_licence, carried.derived_from_release) == ("CC-BY-NC-4.0", True)
    assert carried.model_dump() == ExportSettings(weights_licence="CC-BY-NC-4.0", derived_from_release=True).model_dump()
    with pytest.raises(ValueError, match="leave export.weights_licence out"):
        ExportSettings(weights_licence="MIT").carrying({"licence": "CC-BY-NC-4.0", "origin": "x", "derived_from_release": True})
    assert ExportSettings(weights_licence="MIT").carrying({}).weights_licence == "MIT", "trained from scratch: its maker's choice"
    (own / "README.md").write_text(CARD.format(licence="apache-2.0"))
    assert import_checkpoint(start(own), tmp_path / "a")["weights"]["derived_from_release"] is False
    with pytest.raises(ValueError, match="says that its weights are under 'apache-2.0'"):
        import_checkpoint(start(own, licence="MIT"), tmp_path / "b")
    (own / "README.md").unlink()
    unsaid = import_checkpoint(start(own), tmp_path / "c")["weights"]
    assert (unsaid["licence"], unsaid["derived_from_release"]) == ("CC-BY-NC-4.0", True), "what says nothing counts as released"
    scratch = import_checkpoint(start(checkpoints["base"]), tmp_path / "d")["weights"]
    assert scratch["licence"] is None and not scratch["derived_from_release"]


def _set(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _pickled(own):
    (own / "unet/diffusion_pytorch_model.safetensors").rename(own / "unet/diffusion_pytorch_model.bin")


def _without_a_tensor(own):
    path = own / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors.pop("conv_in.bias")
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda own: _set(own / "unet/config.json", num_registers=4), "sets num_registers, which DreamLiteUNetModel"),
        (lambda own: _set(own / "unet/config.json", in_channels=8), "do not fit its config.json, for one conv_in.weight"),
        (lambda own: _set(own / "vae/config.json", latent_channels=16), "takes 4 channels, but its VAE has 16"),
        (lambda own: _set(own / "scheduler/scheduler_config.json", max_shift=1.16), "sets max_shift to 1.16"),
        (lambda own: _set(own / "model_index.json", _class_name="DreamLiteMobilePipeline"), "is a distilled model"),
        (lambda own: shutil.rmtree(own / "vae"), "lacks vae/"),
        (lambda own: (own / "unet/config.json").write_text("{"), "is not valid JSON"),
        (_pickled, "as a pickle (diffusion_pytorch_model.bin), which can run code"),
        (_without_a_tensor, "1 of [0-9]+ tensors do not fit its config.json, for one conv_in.bias, which is absent"),
    ],
)
def test_a_checkpoint_that_cannot_be_trained_on_is_one_sentence_and_leaves_nothing(own, tmp_path, spoil, words):
    spoil(own)
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")) as caught:
        import_checkpoint(start(own), tmp_path / "checkpoint")
    assert "\n" not in str(caught.value) and not (tmp_path / "checkpoint").exists()


def test_a_hub_model_is_fetched_at_its_revision_and_without_pickles(release, tmp_path, monkeypatch):
    served = shutil.copytree(release, tmp_path / "served")
    (served / "unet/diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (served / "pipeline.py").write_text("raise SystemExit('code of a stranger')")
    with hub_server({"org/model": served}) as (address, _):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        facts = import_checkpoint(start("org/model@main"), tmp_path / "checkpoint")
        assert facts["weights"]["origin"] == f"org/model@{COMMIT}"
        folder, _ = find_checkpoint("org/model@main")
        assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.py"))
        assert Sampler.load(tmp_path / "checkpoint").size_px == 64
        with pytest.raises(ValueError, match="cannot be fetched"):
            find_checkpoint("org/none@main")


@pytest.mark.parametrize(("model", "words"), [("org/model", "at which revision"), ("nowhere", "there is no directory"), ("org/model@main", "HF_HUB_OFFLINE=0")])
def test_what_cannot_be_found_says_how_to_mend_it(model, words):
    with pytest.raises(ValueError, match=words):
        find_checkpoint(model)
