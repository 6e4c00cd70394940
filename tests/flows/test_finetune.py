"""`dreamlite finetune` turns a folder into an adapter that diffusers loads, does nothing twice, and names what is wrong with a folder.
A tiny checkpoint in the layout of the released one stands for it."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DreamLitePipeline
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from dreamlite_data import scenes
from dreamlite_data.lake import Lake
from flows.cli import app
from flows.config import ConfigError
from flows.finetune_cli import describe_data, own_size_px
from tests.trainers.conftest import components  # noqa: F401 - a fixture
from tests.trainers.released import write_release
from trainers.model import load_unet

ADAPTER = "pytorch_lora_weights.safetensors"
BRIEF = ["--rank", "2", "--steps", "3", "--set", "evaluate.steps=2", "--set", "train.sft.batch=2", "--set", "train.sft.learning_rate=1e-2"]


@pytest.fixture(scope="module")
def release(components, tmp_path_factory):  # noqa: F811
    return write_release(components, tmp_path_factory.mktemp("release") / "base")


def images(folder, count=5, side_px=64):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        scene = scenes.sample_scene(rng)
        Image.fromarray(scenes.render(scene)).resize((side_px, side_px)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(scenes.caption(scene, rng))
    return folder


def triplets(folder, count=5):
    rng, lines = np.random.default_rng(0), []
    folder.mkdir(parents=True)
    for number in range(count):
        scene = scenes.sample_scene(rng)
        edit = scenes.sample_edit(scene, rng)
        for name, drawn in (("a", scene), ("b", scenes.apply_edit(scene, edit))):
            Image.fromarray(scenes.render(drawn)).save(folder / f"{number}{name}.png")
        lines.append({"source": f"{number}a.png", "target": f"{number}b.png", "instruction": scenes.instruction(edit, scene, rng)})
    (folder / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def finetune(data, release, output, *options):  # noqa: F811
    return CliRunner().invoke(app, ["finetune", str(data), "--from", str(release), "--output", str(output), *BRIEF, *options])


@pytest.mark.slow
def test_a_folder_becomes_an_adapter_that_diffusers_loads_and_is_not_made_twice(release, tmp_path):
    data, output = images(tmp_path / "data"), tmp_path / "out"
    result = finetune(data, release, output)
    assert result.exit_code == 0, result.output
    with safe_open(output / ADAPTER, "pt") as opened:
        assert opened.metadata()["licence"] == "CC-BY-NC-4.0" and opened.metadata()["base"] == release.name
    assert Image.open(output / "before_after_generate.png").width > 2 * 300
    checkpoint = next((output / "lake").rglob("sft/*/checkpoint"))
    facts = json.loads((checkpoint / "dreamlite.json").read_text())
    assert (facts["hidden_state"], facts["size_px"], facts["weights"]["derived_from_release"]) == ("pre_norm", 64, True)
    stock = DreamLitePipeline.from_pretrained(checkpoint)  # any pipeline on the base; this one has its parts in our layout
    stock.unet = load_unet(release)
    stock.unet.load_lora_adapter(output, weight_name=ADAPTER, prefix="unet")
    stock.unet.fuse_lora()
    stock.unet.unload_lora()
    merged, base = load_unet(checkpoint).state_dict(), load_unet(release).state_dict()
    for name, value in stock.unet.state_dict().items():
        torch.testing.assert_close(value, merged[name], atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(value, base[name]) for name, value in merged.items()), "training moved the network"
    with Lake(output / "lake", read_only=True) as lake:
        trained = lake.query("SELECT checkpoint_id FROM checkpoints WHERE stage = 'sft'")["checkpoint_id"][0].as_py()
        came_from = lake.query(f"SELECT kind, id FROM lineage_of('{trained}')").to_pylist()
    assert {"kind": "weights", "id": str(release)} in came_from
    assert {"image"} <= {row["kind"] for row in came_from}, "and from the user's images"
    again = finetune(data, release, output)
    assert again.exit_code == 0 and "nothing to do" in again.output, again.output


@pytest.mark.thorough
def test_triplets_become_an_adapter_too(release, tmp_path):
    result = finetune(triplets(tmp_path / "data"), release, tmp_path / "out", "--task", "edit", "--hidden-state", "post_norm")
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "out/before_after_edit.png").width > 3 * 300
    facts = json.loads(next((tmp_path / "out/lake").rglob("sft/*/checkpoint/dreamlite.json")).read_text())
    assert facts["hidden_state"] == "post_norm"


@pytest.mark.slow
def test_images_too_small_for_the_checkpoint_are_one_sentence(release, tmp_path):
    result = finetune(images(tmp_path / "data", 2, side_px=32), release, tmp_path / "out")
    assert result.exit_code == 1
    assert "of 2 rows of the data none can be trained on: 2 are smaller than 64 px" in result.stderr and "--size" in result.stderr


@pytest.mark.parametrize(
    ("spoil", "task", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "generate", "there is no folder or file"),
        (lambda folder: [file.unlink() for file in folder.glob("*.png")], "generate", "holds no images"),
        (lambda folder: [file.unlink() for file in folder.glob("*.txt")], "generate", "none of the 2 images in .* has a caption, for one 0.png has no 0.txt"),
        (lambda folder: None, "edit", "holds no table of triplets: put an edits.jsonl there"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_named_before_anything_is_computed(tmp_path, spoil, task, words):
    folder = images(tmp_path / "data", 2)
    spoil(folder)
    with pytest.raises(ConfigError, match=words) as caught:
        describe_data(str(folder), task, None, None)
    assert "\n" not in str(caught.value)


def test_an_adapter_that_was_set_to_nothing_is_refused(release, tmp_path):
    command = ["finetune", str(images(tmp_path / "data")), "--from", str(release), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--set", "train.sft.lora=null"])
    assert result.exit_code == 2 and "train.sft.lora is null; leave it out" in result.stderr


def test_what_lies_there_is_recognised(tmp_path):
    assert describe_data(str(images(tmp_path / "a", 1)), "generate", None, None)["kind"] == "folder"
    table = triplets(tmp_path / "b", 1)
    for given in (table, table / "edits.jsonl"):
        found = describe_data(str(given), "edit", None, None)
        assert (found["kind"], found["mapping"]) == ("jsonl", "triplets")
    hub = describe_data("owner/name", "edit", None, "magicbrush")
    assert (hub["kind"], hub["path"], hub["mapping"]) == ("huggingface", "owner/name", "magicbrush")


def test_a_checkpoint_that_is_none_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is no checkpoint in diffusers layout"):
        own_size_px(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="at which revision"):
        own_size_px("org/name")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE=0"):
        own_size_px("org/name@main")
