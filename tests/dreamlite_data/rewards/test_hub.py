"""A hub id at a revision is fetched, joined with its base and loaded as a directory is; what is not pinned is refused.
A server on this machine stands for the hub, spoken to by the real client."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from PIL import Image

from dreamlite_data.rewards import RewardCheckpointError, load_reward
from dreamlite_data.rewards.hub import HubModel, checkpoint_directory, checkpoint_headers, parse_model
from dreamlite_data.rewards.stored import read_headers, weight_files
from tests.dreamlite_data.rewards.hub_server import COMMIT, hub_server

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def hub(tmp_path, monkeypatch, short_hpsv3_dir):
    whole, bare, base = tmp_path / "whole", tmp_path / "bare", tmp_path / "base"
    shutil.copytree(short_hpsv3_dir, whole)
    (whole / "pytorch_model.bin").write_bytes(b"a pickle")
    (whole / "modeling_own.py").write_text("raise SystemExit('code of a stranger')")
    for folder in (bare, base):
        folder.mkdir()
    for path in short_hpsv3_dir.iterdir():
        shutil.copy(path, bare if path.suffix == ".safetensors" or path.name == "reward_spec.json" else base)
    with hub_server({"org/whole": whole, "org/bare": bare, "org/base": base}) as (address, sent):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield sent


def score(folder: Path) -> float:
    return float(load_reward(folder).score([Image.open(FIXTURES / "image0.png")], ["a cat"]).mu[0])


def test_a_model_of_the_hub_scores_as_its_directory(hub, short_hpsv3_dir):
    wanted = score(short_hpsv3_dir)
    folder = checkpoint_directory("org/whole@v1")
    assert score(folder) == wanted and folder.name == COMMIT
    assert not {"pytorch_model.bin", "modeling_own.py"} & {path.name for path in folder.iterdir()}
    sent = dict(hub)
    assert checkpoint_directory(f"org/whole@{COMMIT}") == folder and hub == sent  # the second time nothing is fetched
    joined = checkpoint_directory("org/bare@main", "org/base@main")
    assert score(joined) == wanted
    assert checkpoint_directory("org/bare@main", "org/base@main") == joined


def test_of_weights_that_are_only_planned_with_the_header_alone_is_fetched(hub, short_hpsv3_dir):
    folder, header = checkpoint_headers("org/bare@main", "org/base@main")
    assert header == read_headers(weight_files(short_hpsv3_dir))
    assert (folder / "config.json").exists() and not list(folder.glob("*.safetensors"))
    assert hub["HPSv3.safetensors"] < (short_hpsv3_dir / "HPSv3.safetensors").stat().st_size / 4


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("org/whole", "at which revision"), ("org/whole@", "at which revision"), ("nothing/here/at@all", "no directory"), ("./x@y", "no directory"),
        ("org/none@main", "cannot be fetched"), ("org/whole@v9", "cannot be fetched"), ("org/bare@main", "--base"),
    ],
)  # fmt: skip
def test_what_cannot_be_found_is_one_sentence(hub, model, words):
    with pytest.raises(RewardCheckpointError, match=words) as caught:
        checkpoint_directory(model)
    assert "\n" not in str(caught.value)


def test_a_directory_comes_before_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "org" / "name@main").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_model("org/name@main") == Path("org/name@main")
    assert parse_model("org/other@main") == HubModel("org/other", "main")
