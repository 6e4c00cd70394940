"""Grading: an artist who draws what is asked scores 1 everywhere, one who changes nothing scores 0 on edits."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import torch

from dreamlite_data import scenes
from trainers.conditioning import as_image
from trainers.evaluate import answer, evaluate_images
from trainers.inference import Sampler
from trainers.pixels import to_uint8
from trainers.questions import draw_questions
from trainers.settings import EvaluateSettings

SETTINGS = EvaluateSettings(prompts=16, steps=2, velocity_rows=8)


class Artist:
    """Draws the scenes of the questions themselves (or, `lazy`, hands every source back)."""

    distilled_steps = 4

    def __init__(self, lazy: bool = False) -> None:
        self.lazy, self.asked = lazy, []
        self.questions = draw_questions(SETTINGS.prompts, SETTINGS.seed)

    def generate(self, prompts, seeds, *, steps, guidance_scale):  # noqa: ANN001, ANN201
        self.asked.append(steps)
        return np.stack([scenes.render(scene) for scene in self.questions.wanted])

    def edit(self, images, instructions, seeds, *, steps, guidance_scale, image_guidance_scale):  # noqa: ANN001, ANN201
        chosen = self.questions.sources if self.lazy else self.questions.targets
        return np.stack([scenes.render(scene) for scene in chosen])

    def round_trip(self, images):  # noqa: ANN001, ANN201
        return np.stack([np.asarray(image) for image in images]) // 2


class RedShare:
    """A reward model that likes red: any real number of an image that tells two sets of answers apart."""

    def score(self, images, prompts, sources=None):  # noqa: ANN001, ANN201
        return SimpleNamespace(mu=torch.tensor([np.asarray(image)[..., 0].mean() for image in images]))


def values(rows: list[dict[str, object]]) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in rows}


def test_a_perfect_artist_scores_one_and_a_lazy_one_changes_nothing(tmp_path) -> None:
    lazy = Artist(lazy=True)
    found = values(evaluate_images(Artist(), {}, SETTINGS, tmp_path, teacher=lazy).scores)
    assert {name: value for name, value in found.items() if not name.startswith("teacher_")} == {
        name: 1.0 for name in found if not name.startswith("teacher_")
    }
    assert {f"edit_exact_{kind}" for kind in scenes.EDIT_KINDS} <= set(found)
    assert found["teacher_generate_exact"] == 1.0 and found["teacher_edit_exact"] == 0.0
    assert lazy.asked == [4]  # the teacher is asked in the student's number of steps
    assert (tmp_path / "grid_generate.png").is_file() and (tmp_path / "grid_edit.png").is_file()
    assert values(json.loads((tmp_path / "scores.json").read_text())) == found


def test_student_and_teacher_are_scored_on_their_own_pictures(tmp_path) -> None:
    judged = evaluate_images(Artist(), {"edit": RedShare()}, SETTINGS, tmp_path, teacher=Artist(lazy=True))
    found = values(judged.scores)
    targets, sources = (np.stack([scenes.render(scene) for scene in drawn]) for drawn in (Artist().questions.targets, Artist().questions.sources))
    assert np.isclose(found["reward_edit"], targets[..., 0].mean()) and np.isclose(found["teacher_reward_edit"], sources[..., 0].mean())
    assert np.isclose(found["reward_edit_of_truth"], (targets[..., 0] // 2).mean())  # the targets through a VAE that halves them
    assert "teacher_reward_edit_of_truth" not in found  # the truth is the same for both
    assert not {"reward_generate", "teacher_reward_generate"} & set(found)  # no reward model, no row
    own = {task: [row["reward"] for row in judged.answers if row["task"] == task] for task in ("generate", "edit")}
    assert own["generate"] == [None] * 16 and np.allclose(own["edit"], targets[..., 0].mean(axis=(1, 2)))  # the student's, each its own


def test_the_truth_is_scored_once_however_many_pictures_a_question_has(checkpoints, tmp_path) -> None:
    class Paired(RedShare):
        def score(self, images, prompts, sources):  # noqa: ANN001, ANN201
            assert len(images) == len(prompts) == len(sources)
            return super().score(images, prompts)

    thrice = SETTINGS.model_copy(update={"prompts": 3, "seeds": 3})
    judged = evaluate_images(Sampler.load(checkpoints["base"]), {"edit": Paired()}, thrice, tmp_path)
    assert {row["metric"]: row["n"] for row in judged.scores if "reward" in row["metric"]} == {"reward_edit": 9, "reward_edit_of_truth": 3}


def test_a_round_trip_is_the_vae_and_nothing_else(checkpoints) -> None:
    sampler = Sampler.load(checkpoints["base"])
    images = [as_image(scenes.render(scene)) for scene in Artist().questions.wanted[:3]]
    alone = np.concatenate([sampler.round_trip([image]) for image in images])
    with torch.no_grad():
        expected = to_uint8(sampler.vae.decoder(sampler.encode_images(images)))
    assert (sampler.round_trip(images, batch=2) == alone).all() and (alone == expected).all()
    assert (alone != np.stack([np.asarray(image) for image in images])).any()


def test_a_base_checkpoint_answers_in_the_steps_of_the_settings_and_a_mobile_one_in_its_own(checkpoints) -> None:
    base, mobile = Sampler.load(checkpoints["base"]), Sampler.load(checkpoints["mobile"])
    few = SETTINGS.model_copy(update={"prompts": 2})
    two, four = answer(base, few).drawn, answer(base, few, 4).drawn
    assert (two != four).any()
    assert (answer(mobile, few).drawn == answer(mobile, few, 2).drawn).all()
