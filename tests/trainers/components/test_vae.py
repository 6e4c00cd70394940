"""The packaged VAE gives scenes back as they were, and training looks at what matters."""

from __future__ import annotations

import numpy as np
import torch

from dreamlite_data import scenes
from trainers.components.build import PACKAGED
from trainers.components.vae import BATCH, CROP_PX, OBJECT_WEIGHT, build_vae, draw_windows, measure_vae
from trainers.model import latent_scale, load_vae


def test_the_packaged_vae_is_no_cap_on_what_a_model_can_show() -> None:
    vae = load_vae(PACKAGED)
    assert latent_scale(vae.config) == 4 and vae.config.latent_channels == 4
    metrics = measure_vae(vae, seed=77, count=192)
    assert metrics["scenes_read"] >= 0.96  # 0.98 and more on 512 scenes, see its record
    assert metrics["scenes_read_noisy"] >= 0.94
    assert abs(metrics["latent_mean"]) < 0.1 and 0.7 < metrics["latent_std"] < 1.3  # what unit noise expects


def test_a_vae_of_noise_reads_nothing() -> None:
    vae = load_vae(PACKAGED)
    for parameter in vae.decoder.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1
    assert measure_vae(vae, seed=77, count=64)["scenes_read"] == 0.0


def test_windows_show_objects_and_weigh_them() -> None:
    images, weight = draw_windows(np.random.default_rng(3))
    assert images.shape == (BATCH, 3, CROP_PX, CROP_PX) and weight.shape == (BATCH, 1, CROP_PX, CROP_PX)
    assert images.min() >= -1 and images.max() <= 1
    heavy = (weight == OBJECT_WEIGHT).float().mean((1, 2, 3))
    assert heavy.min() > 0.02 and (weight == 1).any()
    smallest = 2 * scenes.SIZES["small"] * 0.72  # a small cross has the least of all shapes
    assert heavy.min() * CROP_PX**2 > smallest


def test_training_learns_and_repeats_itself() -> None:
    first, second = [], []
    for values in (first, second):
        build_vae(steps=6, seed=4, log=lambda step, metrics, values=values: values.append(metrics["loss"]))
    assert first == second and len(first) == 1
