"""The packaged VAE gives scenes back as they were, and training looks at what matters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dreamlite_data import scenes
from trainers.components.build import PACKAGED
from trainers.components.classes import FIELDS, cell_classes
from trainers.components.vae import (
    BATCH,
    CROP_PX,
    FACTOR,
    OBJECT_WEIGHT,
    SHAPE_WEIGHT,
    TEMPLATES,
    build_vae,
    draw_windows,
    gaps,
    measure_vae,
    reading_loss,
    shape_difference,
)
from trainers.model import latent_scale, load_vae


def test_the_packaged_vae_is_no_cap_on_what_a_model_can_show() -> None:
    vae = load_vae(PACKAGED)
    assert latent_scale(vae.config) == 8 and vae.config.latent_channels == 4
    metrics = measure_vae(vae, seed=77, count=192)
    assert metrics["scenes_read"] >= 0.97  # 0.989 of 2,048 scenes, see its record
    assert metrics["scenes_read_noisy"] >= 0.97
    assert abs(metrics["latent_mean"]) < 0.1 and 0.7 < metrics["latent_std"] < 1.3  # what unit noise expects


def test_a_vae_of_noise_reads_nothing() -> None:
    vae = load_vae(PACKAGED)
    for parameter in vae.decoder.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1
    assert measure_vae(vae, seed=77, count=64)["scenes_read"] == 0.0


def test_windows_lie_on_the_latent_grid_and_weigh_what_tells_shapes_apart() -> None:
    windows = draw_windows(np.random.default_rng(3))
    images, weight, labels = windows.images, windows.weight, windows.classes
    cells = CROP_PX // FACTOR
    assert images.shape == (BATCH, 3, CROP_PX, CROP_PX) and weight.shape == (BATCH, 1, CROP_PX, CROP_PX)
    assert labels.shape == (BATCH, len(FIELDS), cells, cells)
    assert images.min() >= -1 and images.max() <= 1
    assert (labels.flatten(2) > 0).any(2).all(), "every window shows an object"
    heavy = (weight >= OBJECT_WEIGHT).float().mean((1, 2, 3))
    assert heavy.min() > 0.02
    smallest = 2 * scenes.SIZES["small"] * 0.72  # a small cross has the least of all shapes
    assert heavy.min() * CROP_PX**2 > smallest
    assert (weight == 1).any() and (weight == OBJECT_WEIGHT).any() and weight.max() > OBJECT_WEIGHT + 0.9 * SHAPE_WEIGHT


def test_the_reading_loss_is_least_for_the_drawn_shape_and_falls_with_a_wrong_one() -> None:
    windows = draw_windows(np.random.default_rng(5))
    drawn = windows.templates[torch.arange(BATCH), windows.drawn][:, None]
    other = windows.templates[torch.arange(BATCH), (windows.drawn + 2) % len(TEMPLATES)][:, None]
    right, wrong = (reading_loss(windows.behind + alpha * (windows.colour - windows.behind), windows) for alpha in (drawn, other))
    assert right < 0.1 < 3 < wrong
    assert reading_loss(windows.images, windows) < 0.1  # the rendered windows themselves, other objects in them or not


def test_a_square_differs_from_other_shapes_in_its_corners_and_not_in_its_middle() -> None:
    item = scenes.SceneObject("red", "square", "large", "center")
    difference = shape_difference(scenes.Scene((item,), "white", "plain"))[0]
    x, y = (int(value) for value in item.centre_px())
    reach = int(0.8 * scenes.SIZES["large"])
    assert difference[y, x] == 0 and difference[y - reach, x - reach] == 1 and difference[2, 2] == 0


def test_the_gap_between_neighbours_lies_between_them_and_is_nowhere_without_one() -> None:
    left, right, far = (scenes.SceneObject("red", "square", "large", place) for place in ("left", "center", "bottom right"))
    between = gaps(scenes.Scene((left, right), "white", "plain"))[0]
    middle = int((left.centre_px()[0] + right.centre_px()[0]) / 2)
    assert between[32, middle] == 1 and between[:, : middle - 6].sum() == between[:, middle + 6 :].sum() == 0
    assert gaps(scenes.Scene((left, far), "white", "plain")).sum() == 0


def test_a_whole_scene_is_a_window_of_its_size() -> None:
    windows = draw_windows(np.random.default_rng(3), 4, scenes.CANVAS_PX)
    assert windows.images.shape == (4, 3, scenes.CANVAS_PX, scenes.CANVAS_PX) and windows.classes.shape[2:] == (8, 8)
    alone = draw_windows(np.random.default_rng(3), 4).images
    assert windows.images[0].unfold(1, CROP_PX, FACTOR).unfold(2, CROP_PX, FACTOR).sub(alone[0][:, None, None]).abs().amax((0, 3, 4)).min() == 0


def test_cells_name_the_object_that_covers_them() -> None:
    item = scenes.SceneObject("red", "circle", "small", "center")
    classes = cell_classes(scenes.Scene((item,), "white", "plain"), FACTOR)
    covered = np.zeros((8, 8), dtype=bool)
    covered[3:5, 3:5] = True  # 12 px round the middle of 64
    assert ((classes > 0).all(0) == covered).all() and not classes[:, ~covered].any()
    assert classes[:, 3, 3].tolist() == [1, 1, 1]  # red, circle, small: the first of each


@pytest.mark.thorough
def test_training_learns_and_repeats_itself() -> None:
    first, second = [], []
    for values in (first, second):
        build_vae(steps=6, seed=4, log=lambda step, metrics, values=values: values.append(metrics["loss"]))
    assert first == second and len(first) == 1
