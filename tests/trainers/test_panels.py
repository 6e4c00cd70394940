"""Rows of images of many shapes: each gets the nearest panel, both panels of an edit alike, and every recipe trains on them."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from dreamlite_data.dataset import Dataset
from tests.trainers.conftest import TINY_MODEL
from trainers import data
from trainers.conditioning import PromptEncoder
from trainers.data import TrainingRows
from trainers.flow import deployed_sigmas
from trainers.model import build_unet, load_vae
from trainers.recipes.dmd2 import DMD2Recipe
from trainers.recipes.refl import ReFLRecipe
from trainers.recipes.supervised import SupervisedRecipe
from trainers.settings import DMD2Settings, ReFLSettings, SupervisedSettings

SHAPES = {"square": (80, 80), "wide": (128, 64)}
"""(width, height) of stored images; of each shape two sources and their edits are there."""


class Red:
    def differentiable(self, images, prompts, sources=None):
        assert sources is None or sources.shape == images.shape
        return images[:, 0].mean((1, 2))


@pytest.fixture
def rows_of(components: Path, tmp_path: Path, monkeypatch):
    """Makes TrainingRows over a dataset in memory, with the real encoders and caches on disk."""
    records, stored, sizes = [], {}, {}
    for shape, size in SHAPES.items():
        for number in range(2):
            for kind in ("source", "target"):
                image_id = f"{shape}-{kind}-{number}"
                ramp = np.linspace(0, 255, size[0] * size[1] * 3).astype(np.uint8).reshape(size[1], size[0], 3)
                file = io.BytesIO()
                Image.fromarray(np.roll(ramp, number * 7 + (kind == "target"), axis=1)).save(file, "PNG")
                stored[image_id], sizes[image_id] = file.getvalue(), size
            common = {"image_id": f"{shape}-target-{number}", "text": "x", "split": "train", "edit_type": None}
            records += [
                {"row_id": f"g-{shape}-{number}", "task": "generate", "source_image_id": None, "edit_mask": None, **common},
                {"row_id": f"e-{shape}-{number}", "task": "edit", "source_image_id": f"{shape}-source-{number}", "edit_mask": b"\xff" * 32 + bytes(32), **common},
            ]
    monkeypatch.setattr(data, "open_dataset", lambda lake, name, version: Dataset(name, 1, "d", pa.Table.from_pylist(records)))
    monkeypatch.setattr(data, "read_images", lambda lake, ids: {image_id: stored[image_id] for image_id in ids})
    monkeypatch.setattr(data, "stored_sizes", lambda lake, ids: {image_id: sizes[image_id] for image_id in ids})
    vae, encoder = load_vae(components), PromptEncoder.load(components, "post_norm")

    def make(**choices) -> TrainingRows:
        return TrainingRows(
            SimpleNamespace(root=tmp_path), [("mine", 1)], split="train", vae=vae, encoder=encoder, components_digest="0" * 64, size_px=64, **choices
        )

    return make


def test_rows_take_the_panel_nearest_to_their_image(rows_of):
    rows, square = rows_of(aspect_buckets=True), rows_of()
    wide = (64, 96)
    assert {row.row_id for row in rows.rows if rows.panel(row) == wide} == {row.row_id for row in rows.rows if "wide" in row.row_id}
    assert set(rows.pools()) == {(64, 64), wide} and set(square.pools()) == {(64, 64)}
    chosen = rows.pools()[wide]["edit"]
    batch = rows.batch(chosen, [0, 1])
    assert batch.latents.shape == batch.condition.shape == (2, 4, 8, 12)
    assert batch.weight.shape == (2, 1, 8, 12) and (batch.weight[:, :, :4] == 2.0).all() and (batch.weight[:, :, 4:] == 1.0).all()
    assert batch.size_px.tolist() == [[96.0, 64.0]] * 2, "(width, height)"
    same = rows.pools()[64, 64]["edit"]
    assert torch.equal(rows.batch(same, [0, 1]).latents, square.batch(same, [0, 1]).latents), "squares are as without buckets"
    assert square.batch(chosen, [0, 1]).latents.shape == (2, 4, 8, 8)


def test_the_cache_answers_for_the_same_content_and_parts_alone(rows_of, monkeypatch):
    rows_of(aspect_buckets=True)
    monkeypatch.setattr(data, "read_images", lambda lake, ids: pytest.fail("encoded again"))
    rows_of(aspect_buckets=True)
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        rows_of()  # the wide images as squares are other latents


def test_every_recipe_trains_on_panels_of_both_shapes(rows_of, components, tmp_path):
    rows = rows_of(aspect_buckets=True)
    unet = build_unet(TINY_MODEL, 64, 8)
    tasks = {"generate": 0.5, "edit": 0.5}
    supervised = SupervisedRecipe(unet, rows, SupervisedSettings(tasks=tasks, datasets=("mine",), steps=2, batch=4, warmup_steps=1), (0, 0))
    shapes = set()
    read = rows.batch
    rows.batch = lambda *each, **choices: shapes.add(tuple((batch := read(*each, **choices)).condition.shape[2:])) or batch
    assert all(np.isfinite(supervised.step(index)["loss"]) for index in range(2))
    assert shapes == {(8, 8), (8, 12)}
    refl = ReFLSettings(steps=2, batch=2, rollout_steps=2, sigma_high=1.0)
    recipe = ReFLRecipe(unet, load_vae(components), dict.fromkeys(tasks, Red()), rows, refl, (0, 4))
    assert all(np.isfinite(value) for index in range(2) for value in recipe.step(index).values())
    recipe = DMD2Recipe(unet, rows, DMD2Settings(steps=1, batch=4, student_steps=2, fake_steps=1, fake_warmup_steps=0, gan_weight=0.1), (0, 5))
    assert all(np.isfinite(value) for value in recipe.step(0).values())
    batch = read(rows.pools()[64, 96]["edit"], [0, 1])
    assert recipe._sigmas(batch) == deployed_sigmas(2, 8, 12) != deployed_sigmas(2, 8, 8), "the shift follows the real grid"
