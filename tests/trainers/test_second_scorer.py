"""A second scorer stops a run in which the reward is hacked, and lets one go on in which both rise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dreamlite_data.rewards import RewardScores, load_scorer
from tests.dreamlite_data.rewards import tiny_scorers
from tests.trainers.conftest import TINY_MODEL
from tests.trainers.synthetic import SceneRows
from trainers.conditioning import PromptEncoder
from trainers.loop import run
from trainers.model import build_unet, load_vae
from trainers.recipes.refl import ReFLRecipe
from trainers.recipes.second_scorer import HackingWatch, pictures
from trainers.settings import ReFLSettings


class Brightness:
    """A reward that is hacked by light alone."""

    kind = "brightness"

    def __init__(self, sign: float = 1.0) -> None:
        self.sign = sign

    def differentiable(self, images, prompts, sources=None):
        return self.sign * images.mean((1, 2, 3))

    def score(self, images, prompts, sources=None):
        mu = np.array([self.sign * np.asarray(image).mean() / 255 for image in images], np.float32)
        return RewardScores(mu, mu, np.stack([mu, mu], -1)[:, None], (None,) * len(images), np.ones(len(images)))


@pytest.fixture(scope="module")
def rows(components):
    return SceneRows(4, load_vae(components), PromptEncoder.load(components, "post_norm"))


SETTINGS = ReFLSettings(
    steps=24, batch=2, rollout_steps=2, hinge="none", reward_weight=1.0, velocity_weight=0.0, learning_rate=2e-3, sigma_high=1.0,
    second_every=2, second_window=2, second_drop=0.2,
)  # fmt: skip


def recipe_with(rows, components, second) -> ReFLRecipe:
    rewards = {task: Brightness() for task in ("generate", "edit")}
    return ReFLRecipe(build_unet(TINY_MODEL, 64, 8, 0), load_vae(components), rewards, rows, SETTINGS, (0,), second)


def test_a_hacked_reward_stops_the_run_and_stays_stopped(rows, components, tmp_path, capfd):
    recipe = recipe_with(rows, components, {"generate": Brightness(-1.0)})
    metrics = run(recipe, steps=SETTINGS.steps, output=tmp_path, label="refl")
    assert 0 < metrics["stopped_at_step"] < SETTINGS.steps
    assert metrics["reward_generate_gain"] > 0 > metrics["second_generate_gain"]
    assert "the reward of 'generate' rose" in capfd.readouterr().err
    weights = {name: value.clone() for name, value in recipe.unet.state_dict().items()}
    again = recipe_with(rows, components, {"generate": Brightness(-1.0)})  # as after a kill: what it saw is in the state
    once_more = run(again, steps=SETTINGS.steps, output=tmp_path, label="refl")
    assert once_more == {name: value for name, value in metrics.items() if name in once_more}, "no step, and the metrics of before"
    assert once_more["stopped_at_step"] == metrics["stopped_at_step"]
    assert all(torch.equal(value, again.unet.state_dict()[name]) for name, value in weights.items())


def test_a_second_scorer_that_rises_too_changes_nothing(rows, components, tmp_path):
    watched, plain = recipe_with(rows, components, {"generate": Brightness()}), recipe_with(rows, components, None)
    metrics = run(watched, steps=8, output=tmp_path / "watched", label="refl")
    run(plain, steps=8, output=tmp_path / "plain", label="refl")
    assert "stopped_at_step" not in metrics and metrics["second_generate_gain"] > 0
    assert all(torch.equal(value, plain.unet.state_dict()[name]) for name, value in watched.unet.state_dict().items())


@pytest.mark.parametrize(
    ("gains", "stops"),
    [([(1.0, -0.6), (1.0, -0.6)], True), ([(1.0, -0.4), (1.0, -0.4)], False), ([(-0.1, -0.9), (-0.1, -0.9)], False), ([(1.0, -2.0)], False),
     ([(1.0, -2.0), (1.0, 0.5), (1.0, 0.5)], False), ([(1.0, 1.0), (0.5, -0.9), (0.5, -0.9)], True)],
)  # fmt: skip
def test_the_rule_needs_a_full_window_a_rise_and_a_fall(gains, stops):
    watch = HackingWatch({"generate": Brightness()}, SETTINGS.model_copy(update={"second_drop": 0.5}))
    for reward, second in gains:
        watch.record("generate", reward, second)
    assert (watch.stop_reason() is not None) == stops


def test_gains_are_paired_and_in_the_start_model_s_deviations():
    watch = HackingWatch({"generate": Brightness()}, SETTINGS)
    start = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    gain = watch.second_gain("generate", start + 0.1, start, ["a"] * 3, None)
    assert gain == pytest.approx(0.1 / np.std([0.2, 0.4, 0.6]), rel=0.02)  # 8 bits
    assert watch.due("generate", 1) and not watch.due("generate", 0) and not watch.due("edit", 1)


def test_a_scorer_of_a_folder_can_be_the_second_one(rows, components, tmp_path):
    (tmp_path / "clip").mkdir()
    tiny_scorers.tiny_clip_model(tmp_path / "clip")
    second = load_scorer("clip", tmp_path / "clip")
    recipe = recipe_with(rows, components, {"generate": second})
    logs = [recipe.step(index) for index in range(0, 4, 2)]
    assert np.isfinite(logs[1]["second_generate_gain"]) and "second_generate_gain" not in logs[0]
    images = torch.rand(2, 3, 64, 64)
    assert second.differentiable(images, ["a red circle"] * 2).shape == (2,) and len(pictures(images)) == 2


def test_an_image_that_the_second_scorer_cannot_read_is_said():
    class Blind(Brightness):
        def score(self, images, prompts, sources=None):
            nothing = np.full(len(images), np.nan, np.float32)
            return RewardScores(nothing, nothing, nothing[:, None, None], ("too dark",) * len(images), np.zeros(len(images)))

    watch = HackingWatch({"generate": Blind()}, SETTINGS)
    with pytest.raises(RuntimeError, match="second scorer of 'generate' could not score an image: too dark"):
        watch.second_gain("generate", torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8), ["a"], None)
