"""What a user can get wrong ends in one sentence that names it, before a weight moves and without a file written over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from dreamlite_data.dataset import Dataset, DatasetError
from dreamlite_data.rewards import load_reward
from tests.trainers.conftest import TINY_MODEL
from tests.trainers.synthetic import SceneRows
from trainers import data
from trainers.components.build import PACKAGED
from trainers.conditioning import PromptEncoder
from trainers.data import read_rows
from trainers.loop import Ema, run
from trainers.model import build_unet, load_unet, load_vae
from trainers.recipes.dmd2 import DMD2Recipe
from trainers.recipes.refl import ReFLRecipe
from trainers.recipes.supervised import SupervisedRecipe
from trainers.settings import DMD2Settings, ReFLSettings, SupervisedSettings
from trainers.tensor_cache import TensorCache

JOINT = SupervisedSettings(
    tasks={"generate": 0.5, "edit": 0.5}, datasets=("t2i", "edit"), steps=4, batch=4, micro_batch=4, warmup_steps=1, drop_both_edit=0.0
)


@pytest.fixture(scope="module")
def rows(components):
    return SceneRows(4, load_vae(components), PromptEncoder.load(components, "post_norm"))


def fresh():
    return build_unet(TINY_MODEL, 64, 8)


def dataset_with(monkeypatch, **changes: list | None) -> None:
    """The dataset that `read_rows` opens: one row of each task, with columns changed or (None) left out."""
    columns = {
        "row_id": ["g", "e"], "task": ["generate", "edit"], "image_id": ["a", "b"], "source_image_id": [None, "a"], "text": ["x", "y"],
        "edit_type": [None, "colour"], "edit_mask": [None, bytes(64)], "split": ["train", "train"],
    } | changes  # fmt: skip
    table = pa.table({name: values for name, values in columns.items() if values is not None})
    monkeypatch.setattr(data, "open_dataset", lambda lake, name, version: Dataset(name, 3, "d", table))


def read(settings) -> list[data.Row]:
    return read_rows(None, [("mine", 3)], split="train", columns=settings.columns)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"image_id": None}, "mine@3 has no column 'image_id'"), ({"text": ["x", None]}, "1 of 2 rows have no text"),
     ({"source_image_id": [None, None]}, "1 of 1 rows of task edit have no source_image_id"),
     ({"edit_mask": [None, None]}, "1 of 1 rows of task edit have no edit_mask"), ({"edit_mask": None}, "no column 'edit_mask'")],
)  # fmt: skip
def test_a_dataset_without_what_the_recipe_needs_is_refused(monkeypatch, changes, said):
    dataset_with(monkeypatch)
    assert [row.row_id for row in read(JOINT)] == ["g", "e"]
    dataset_with(monkeypatch, **changes)
    with pytest.raises(DatasetError, match=said):
        read(JOINT)


def test_only_the_recipe_that_weighs_the_foreground_needs_masks(monkeypatch):
    dataset_with(monkeypatch, edit_mask=[None, None])
    for settings in (JOINT.model_copy(update={"foreground_weight": False}), ReFLSettings(steps=1), DMD2Settings(steps=1)):
        assert len(read(settings)) == 2


@contextmanager
def not_finite(rows: SceneRows, image_id: str) -> Iterator[None]:
    """The latent of one image is NaN inside the block."""
    healthy = rows.latents.values[image_id]
    rows.latents.values[image_id] = torch.full_like(healthy, float("nan"))
    try:
        yield
    finally:
        rows.latents.values[image_id] = healthy


def test_a_nan_in_a_batch_stops_before_any_weight_takes_it_and_names_the_row(rows, tmp_path):
    recipe = SupervisedRecipe(fresh(), rows, JOINT, (1,))
    run(recipe, steps=1, output=tmp_path, label="joint")
    state = (tmp_path / "state.pt").read_bytes()
    weights = {name: value.clone() for name, value in recipe.unet.state_dict().items()}
    bad = rows.rows[recipe.plans[0].indices(1)[0][0]]
    stopped = pytest.raises(FloatingPointError, match=rf"joint: the loss of 1 rows is not finite at step 1 \({bad.row_id}\)")
    with not_finite(rows, bad.image_id), stopped:
        run(recipe, steps=4, output=tmp_path, label="joint")
    kept = json.loads((tmp_path / "offending_rows.json").read_text())
    assert kept["step"] == 1 and [row["row_id"] for row in kept["rows"]] == [bad.row_id]
    assert (tmp_path / "state.pt").read_bytes() == state, "the checkpoint before it is untouched"
    assert all(torch.equal(value, weights[name]) for name, value in recipe.unet.state_dict().items())
    run(SupervisedRecipe(fresh(), rows, JOINT, (1,)), steps=2, output=tmp_path, label="joint")  # with the row mended it goes on


def test_an_image_that_is_not_finite_stops_reward_learning_and_names_its_rows(rows, components, tmp_path):
    rewards = {task: load_reward(PACKAGED / "rewards" / task) for task in ("generate", "edit")}
    settings = ReFLSettings(steps=4, batch=2, micro_batch=1, rollout_steps=2, sigma_high=1.0)
    recipe = ReFLRecipe(fresh(), load_vae(components), rewards, rows, settings, (0,))
    with torch.no_grad():
        recipe.unet.conv_out.bias.fill_(1e3)  # far out, and finite: clamped, not refused
    recipe.step(0)
    with torch.no_grad():
        recipe.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the image of 1 rows is not finite at step 0"):
        run(recipe, steps=4, output=tmp_path, label="refl")
    assert json.loads((tmp_path / "offending_rows.json").read_text())["rows"]


def test_a_gradient_that_is_not_finite_stops_too(rows, tmp_path):
    recipe = SupervisedRecipe(fresh(), rows, JOINT, (1,))
    recipe.unet.conv_out.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match="the gradient of .* rows is not finite at step 0"):
        run(recipe, steps=1, output=tmp_path, label="joint")
    kept = json.loads((tmp_path / "offending_rows.json").read_text())
    batch = {rows.rows[index].row_id for index in recipe.plans[0].indices(0)[0]}
    assert kept["not_finite"] == "the gradient" and {row["row_id"] for row in kept["rows"]} == batch, "each of them fails alone"


@pytest.mark.parametrize("inner", [0, 1], ids=["student", "fake score"])
def test_a_nan_in_distillation_stops_the_network_that_meets_it(rows, tmp_path, inner):
    """A source that is not finite, in a batch of the student or of the fake score: neither takes a step with it."""
    settings = DMD2Settings(steps=2, batch=2, micro_batch=2, student_steps=2, fake_steps=1, fake_warmup_steps=0)
    recipe = DMD2Recipe(fresh(), rows, settings, (1,))
    run(recipe, steps=1, output=tmp_path, label="dmd2")
    state = (tmp_path / "state.pt").read_bytes()
    weights = {name: [value.clone() for value in net.state_dict().values()] for name, net in recipe.modules.items()}
    bad = next(rows.rows[index] for index in recipe.plan.indices(2 + inner)[0] if rows.rows[index].task == "edit")
    stopped = pytest.raises(FloatingPointError, match=rf"dmd2: the loss of 1 rows is not finite at step 1 \({bad.row_id}\)")
    with not_finite(rows, bad.source_image_id), stopped:
        run(recipe, steps=2, output=tmp_path, label="dmd2")
    assert [row["row_id"] for row in json.loads((tmp_path / "offending_rows.json").read_text())["rows"]] == [bad.row_id]
    assert (tmp_path / "state.pt").read_bytes() == state
    moved = {name for name, net in recipe.modules.items() if not all(map(torch.equal, weights[name], net.state_dict().values()))}
    assert moved == ({"fake"} if inner == 0 else set()), "the fake score's step comes first"


def test_a_damaged_state_and_one_of_another_network_are_refused_and_kept(rows, tmp_path):
    run(SupervisedRecipe(fresh(), rows, JOINT, (1,)), steps=1, output=tmp_path, label="joint")
    whole = (tmp_path / "state.pt").read_bytes()
    other = build_unet(TINY_MODEL.model_copy(update={"layers": 2}), 64, 8)
    with pytest.raises(ValueError, match="state.pt is not of this stage's network"):
        run(SupervisedRecipe(other, rows, JOINT, (1,)), steps=2, output=tmp_path, label="joint")
    (tmp_path / "state.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="state.pt is damaged"):
        run(SupervisedRecipe(fresh(), rows, JOINT, (1,)), steps=2, output=tmp_path, label="joint")
    assert (tmp_path / "state.pt").read_bytes() == whole[: len(whole) // 2]


@pytest.mark.parametrize(
    ("changed", "key", "said"),
    [({"learning_rate": 1e-4}, (1,), "learning_rate: 0.001 there, 0.0001 here"), ({"optimizer": "muon"}, (1,), "optimizer: adamw there, muon here"),
     ({"steps": 8}, (1,), "steps: 4 there, 8 here"), ({}, (2,), r"key: \[1\] there, \[2\] here")],
)  # fmt: skip
def test_a_checkpoint_of_other_settings_is_no_beginning(rows, tmp_path, changed, key, said):
    run(SupervisedRecipe(fresh(), rows, JOINT, (1,)), steps=1, output=tmp_path, label="joint")
    state = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(ValueError, match=f"state.pt began as another training .*{said}"):
        run(SupervisedRecipe(fresh(), rows, JOINT.model_copy(update=changed), key), steps=2, output=tmp_path, label="joint")
    assert (tmp_path / "state.pt").read_bytes() == state
    run(SupervisedRecipe(fresh(), rows, JOINT.model_copy(update={"micro_batch": 2}), (1,)), steps=2, output=tmp_path, label="joint")


@pytest.mark.parametrize("first", [0.0, 0.1])
def test_a_discriminator_does_not_appear_in_or_vanish_from_a_training(rows, tmp_path, first):
    settings = DMD2Settings(steps=2, batch=2, student_steps=2, fake_steps=1, fake_warmup_steps=0)
    begun, other = (DMD2Recipe(fresh(), rows, settings.model_copy(update={"gan_weight": weight}), (1,)) for weight in (first, 0.1 - first))
    run(begun, steps=1, output=tmp_path, label="dmd2")
    with pytest.raises(ValueError, match="began as another training .*gan_weight"):
        run(other, steps=2, output=tmp_path, label="dmd2")


def test_a_damaged_checkpoint_is_named(checkpoints, tmp_path):
    folder = tmp_path / "checkpoint"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet/config.json").write_bytes((checkpoints["base"] / "unet/config.json").read_bytes())
    content = (checkpoints["base"] / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(content)
    load_unet(folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(content[:-4000])
    with pytest.raises(ValueError, match="checkpoint/unet cannot be read"):
        load_unet(folder)


def test_a_damaged_cache_part_is_named(tmp_path):
    cache = TensorCache(tmp_path)
    cache.fill(["a", "b"], lambda chunk: [torch.ones(3) for _ in chunk], "ones")
    assert TensorCache(tmp_path).get(["b"])[0].tolist() == [1.0, 1.0, 1.0]
    (path,) = tmp_path.glob("part-*.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        TensorCache(tmp_path)
    save_file({"flat": torch.ones(1)}, path)  # a file of another kind
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        TensorCache(tmp_path)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_not_trained(rows, kind):
    with pytest.raises(ValueError, match="load them in float32"):
        Ema(fresh().to(kind), 0.9)
    assert torch.tensor(1.0, dtype=torch.bfloat16) + 1e-3 == 1.0, "why: a small update is lost"
    assert np.isfinite(SupervisedRecipe(fresh(), rows, JOINT, (1,)).step(0)["loss"])
