"""A run of ReFL or DMD2 that was cut in two ends as the whole one, to the last bit: every network, average and optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainers.conftest import TINY_MODEL, same
from tests.trainers.distributed_worker import Warmth
from tests.trainers.synthetic import SceneRows
from trainers.conditioning import PromptEncoder
from trainers.loop import Recipe, run
from trainers.model import build_unet, load_vae
from trainers.recipes.dmd2 import DMD2Recipe
from trainers.recipes.refl import ReFLRecipe
from trainers.settings import DMD2Settings, ReFLSettings

REFL = ReFLSettings(steps=4, batch=2, micro_batch=2, rollout_steps=3, sigma_high=1.0, hinge="none", learning_rate=1e-3)
DMD2 = DMD2Settings(steps=4, batch=2, micro_batch=2, fake_steps=1, fake_warmup_steps=1, gan_weight=0.1, gan_fake_weight=0.1)


@pytest.fixture(scope="module")
def rows(components: Path) -> SceneRows:
    return SceneRows(6, load_vae(components), PromptEncoder.load(components, "post_norm"))


def recipe_of(name: str, rows: SceneRows, components: Path) -> Recipe:
    unet = build_unet(TINY_MODEL, 64, 8, 0)
    if name == "dmd2":
        return DMD2Recipe(unet, rows, DMD2, (0, 5))
    return ReFLRecipe(unet, load_vae(components), dict.fromkeys(("generate", "edit"), Warmth()), rows, REFL, (0, 4))


@pytest.mark.parametrize("name", ["refl", "dmd2"])
def test_two_halves_are_the_whole_and_a_half_without_its_optimizer_is_not(name: str, rows: SceneRows, components: Path, tmp_path: Path) -> None:
    for folder, parts in (("whole", (4,)), ("parts", (2, 4)), ("lossy", (2,))):
        for steps in parts:
            run(recipe_of(name, rows, components), steps=steps, output=tmp_path / folder, label=folder)
    read = {folder: torch.load(tmp_path / folder / "state.pt", weights_only=True) for folder in ("whole", "parts", "lossy")}
    kept = ("modules", "optimizers", "ema", "position")
    assert all(same(read["whole"][part], read["parts"][part]) for part in kept)
    assert not same(read["whole"]["modules"], read["lossy"]["modules"])
    # The control: weights alone go on elsewhere.
    lossy = recipe_of(name, rows, components)
    for module, weights in read["lossy"]["modules"].items():
        lossy.modules[module].load_state_dict(weights)
    for index in (2, 3):
        lossy.step(index)
    own = {module: net.state_dict() for module, net in lossy.modules.items()}
    assert not same(read["whole"]["modules"], own)
