"""The small world is exact: what is drawn is read back, what is said is parsed back,
and every edit changes what its instruction names and nothing else."""

import numpy as np
import pytest

from dreamlite_data import scenes


@pytest.fixture(scope="module")
def many():
    rng = np.random.default_rng(7)
    return [scenes.sample_scene(rng) for _ in range(400)]


def test_every_rendered_scene_is_read_back_exactly(many):
    assert [scenes.read_scene(scenes.render(scene)).scene.key() for scene in many] == [scene.key() for scene in many]


def test_reading_measures_position_to_half_a_pixel(many):
    for scene in many[:100]:
        found = {item.key(): item.centre_px() for item in scenes.read_scene(scenes.render(scene)).scene.objects}
        for item in scene.objects:
            assert np.hypot(*np.subtract(found[item.key()], item.centre_px())) < 0.75


@pytest.mark.parametrize("seed", range(3))
def test_mild_blur_and_noise_do_not_change_the_reading(many, seed):
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    right = 0
    for scene in many[:100]:
        image = ndimage.gaussian_filter(scenes.render(scene).astype(float), (0.7, 0.7, 0)) + rng.normal(0, 4, (64, 64, 3))
        right += scenes.matches(np.clip(image, 0, 255).astype(np.uint8), scene)
    assert right >= 98


def test_noise_and_foreign_images_are_not_read_as_scenes():
    rng = np.random.default_rng(0)
    assert scenes.read_scene(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).scene is None
    assert scenes.read_scene(np.zeros((64, 64, 3), dtype=np.uint8)).scene is None


def test_captions_parse_back_and_a_foreign_word_is_refused(many):
    rng = np.random.default_rng(1)
    for scene in many:
        text = scenes.caption(scene, rng)
        assert scenes.parse_caption(text).key() == scene.key()
        assert scenes.parse_caption(text + " in the rain") is None


def test_json_round_trip(many):
    assert all(scenes.Scene.from_json(scene.to_json()) == scene for scene in many)


@pytest.mark.parametrize("kind", scenes.EDIT_KINDS)
def test_edit_changes_what_it_names_and_nothing_else(many, kind):
    rng = np.random.default_rng(2)
    tried = 0
    for scene in many:
        try:
            edit = scenes.sample_edit(scene, rng, kind)
        except ValueError:
            continue
        tried += 1
        target = scenes.apply_edit(scene, edit)
        image = scenes.render(target)
        assert target.key() != scene.key()
        assert scenes.edit_matches(scene, image, target)
        assert not scenes.edit_matches(scene, scenes.render(scene), target), "a no-op must not pass"
        assert scenes.describe_difference(scene, target) == scenes.instruction(edit, scene)
    assert tried > 50


def test_moved_bystander_fails_the_edit(many):
    import dataclasses

    rng = np.random.default_rng(3)
    scene = next(scene for scene in many if len(scene.objects) == 3)
    target = scenes.apply_edit(scene, scenes.sample_edit(scene, rng, "background"))
    shifted = dataclasses.replace(
        target, objects=(dataclasses.replace(target.objects[0], offset=(4.5, 0.0)), *target.objects[1:])
    )
    assert scenes.matches(scenes.render(shifted), target)
    assert not scenes.edit_matches(scene, scenes.render(shifted), target)
