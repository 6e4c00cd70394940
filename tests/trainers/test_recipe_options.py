"""Each option of a recipe: off it is the plain loss bit for bit, on it does what its formula says."""

from __future__ import annotations

import pytest
import torch

from tests.trainers.conftest import TINY_MODEL, same
from tests.trainers.synthetic import SceneRows
from tests.trainers.toys import IDENTITY_VAE, PointNet, PointRows
from trainers import flow
from trainers.conditioning import PromptEncoder
from trainers.data import foreground
from trainers.loop import Ema, mean_logs, power_exponent, run
from trainers.model import build_unet, load_vae
from trainers.recipes.detectors import change_outside_edit, picture_measures
from trainers.recipes.discriminator import middle_features
from trainers.recipes.dmd2 import DMD2Recipe
from trainers.recipes.refl import ReFLRecipe, norm_ratios
from trainers.recipes.supervised import SupervisedRecipe, draw_batch_times, velocity_losses
from trainers.settings import DMD2Settings, ReFLSettings, SizePhase, SupervisedSettings

POINTS = PointRows(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), 0.2)
JOINT = SupervisedSettings(tasks={"generate": 0.5, "edit": 0.5}, datasets=("toy",), steps=4, batch=8, micro_batch=4, warmup_steps=1)
REFL = ReFLSettings(steps=2, batch=4, micro_batch=4, rollout_steps=4, sigma_high=1.0, learning_rate=1e-3)
DMD2 = DMD2Settings(steps=2, batch=4, micro_batch=4, fake_steps=1, fake_warmup_steps=0)


def point_net() -> PointNet:
    torch.manual_seed(0)
    return PointNet(2)


def batch_of(settings: SupervisedSettings):
    recipe = SupervisedRecipe(point_net(), POINTS, settings, (0,))
    batch = POINTS.batch(*recipe.plans[0].indices(0))
    times = draw_batch_times(batch, settings, (0,))
    return recipe, batch, times


def test_min_snr_is_off_by_default_and_its_weight_is_that_of_the_data_loss():
    recipe, batch, times = batch_of(JOINT)
    plain = velocity_losses(recipe.unet, batch, times, JOINT, (0,))
    weighted = velocity_losses(recipe.unet, batch, times, JOINT.model_copy(update={"min_snr_gamma": 5.0}), (0,))
    snr = ((1 - times) / times) ** 2
    torch.testing.assert_close(weighted, plain * times**2 * snr.clamp(max=5.0))
    without = velocity_losses(recipe.unet, batch, times, JOINT.model_copy(update={"foreground_weight": False}), (0,))
    assert torch.equal(plain, without), "a foreground weight of 1 everywhere is the plain loss, bit for bit"
    assert (weighted != plain).all()


def test_an_edit_of_the_whole_image_has_the_plain_loss_and_one_of_half_does_not():
    recipe, batch, times = batch_of(JOINT)
    row = batch.rows[0].__class__("e", "edit", "t", "s", "x", None, bytes([255] * 64))
    half = row.__class__("e", "edit", "t", "s", "x", None, bytes([255] * 32 + [0] * 32))
    off = JOINT.model_copy(update={"foreground_weight": False})
    losses = {}
    for name, each in (("whole", row), ("half", half)):
        weighted = batch.__class__(**{**vars(batch), "weight": foreground(each, (8, 8)).expand_as(batch.weight)})
        losses[name] = velocity_losses(recipe.unet, weighted, times, JOINT, (0,))
        losses["plain"] = velocity_losses(recipe.unet, weighted, times, off, (0,))
    assert torch.equal(losses["whole"], losses["plain"])
    assert (losses["half"] > losses["plain"]).all()


def test_a_mask_follows_the_crop_of_its_image():
    """The left half of a wide image is edited: a square of its middle shows half of it, a panel of its shape all of it."""
    row = POINTS.rows[0].__class__("e", "edit", "t", "s", "x", None, bytes([255] * 4 + [0] * 4) * 8)
    wide, middle = foreground(row, (4, 8), image_size=(200, 100)), foreground(row, (8, 8), image_size=(200, 100))
    assert (wide[0, :, :4] == 2.0).all() and (wide[0, :, 4:] == 1.0).all()
    assert (middle[0, :, :4] == 2.0).all() and (middle[0, :, 4:] == 1.0).all()
    corner = row.__class__("e", "edit", "t", "s", "x", None, bytes([255] + [0] * 7) * 8)
    assert foreground(corner, (8, 8), image_size=(200, 100)).unique().tolist() == [1.0], "what the crop leaves out has no weight"
    assert foreground(corner, (8, 8)).max() > 3.9


def test_stratified_times_cover_every_part_and_single_draws_do_not_have_to():
    many = JOINT.model_copy(update={"batch": 64})
    _, batch, times = batch_of(many)
    assert sorted((times * 64).long().tolist()) == list(range(64))
    alone = draw_batch_times(batch, many.model_copy(update={"stratified_times": False}), (0,))
    assert len(set((alone * 64).long().tolist())) < 60
    assert torch.equal(alone[3:5], draw_batch_times(batch.split(3)[1], many.model_copy(update={"stratified_times": False}), (0,))[:2])


def test_logs_hold_the_loss_of_each_task_and_of_each_part_of_the_times():
    recipe, *_ = batch_of(JOINT)
    metrics = recipe.step(0)
    bins = [metrics[f"loss_sigma_{low:g}_to_{low + 0.25:g}"] for low in (0, 0.25, 0.5, 0.75)]
    assert sum(bins) / 4 == pytest.approx(metrics["loss"], rel=1e-5)  # eight stratified rows, two in each part
    assert (metrics["loss_generate"] + metrics["loss_edit"]) / 2 == pytest.approx(metrics["loss"], rel=1e-5)
    assert metrics["gradient_norm"] > 0


@pytest.mark.parametrize(("width", "exponent"), [(0.05, 16.97), (0.10, 6.94)])
def test_a_power_law_average_has_its_width_and_its_closed_form(width, exponent):
    assert power_exponent(width) == pytest.approx(exponent, abs=0.01)
    module = torch.nn.Linear(1, 1, bias=False)
    ema, steps = Ema(module, 0.9, width), 400
    weights = torch.zeros(steps)
    for step in range(1, steps + 1):
        torch.nn.init.constant_(module.weight, float(step))
        ema.update(module)
        decay = (1 - 1 / step) ** (power_exponent(width) + 1)
        weights *= decay
        weights[step - 1] = 1 - decay
    times = torch.arange(1, steps + 1)
    assert ema.weights["weight"].item() == pytest.approx(float((weights * times).sum()), rel=1e-4)
    spread = ((weights * times**2).sum() - (weights * times).sum() ** 2).sqrt() / steps
    assert spread == pytest.approx(width, rel=0.05), "the standard deviation of its profile, in units of the run"


def test_phases_of_size_share_one_stage():
    """Steps 0 and 1 read the first set of rows, 2 and 3 the second; positions and draws go on."""
    phases = (SizePhase(size_px=32, steps=2, logical_size_px=64, micro_batch=2), SizePhase(size_px=64, steps=2))
    settings = JOINT.model_copy(update={"size_phases": phases})
    first, second = (PointRows(POINTS.means, 0.2) for _ in range(2))
    read = []
    for name, each in (("first", first), ("second", second)):
        each.batch = lambda indices, positions, name=name, **_: read.append((name, positions[0])) or POINTS.batch(indices, positions)
    recipe = SupervisedRecipe(point_net(), [first, second], settings, (0,))
    plain = SupervisedRecipe(point_net(), POINTS, JOINT.model_copy(update={"micro_batch": 8}), (0,))
    losses = [(recipe.step(index)["loss"], plain.step(index)["loss"]) for index in range(4)]
    assert read == [("first", 0), ("first", 8), ("second", 16), ("second", 24)]
    assert all(ours == pytest.approx(theirs, rel=1e-4) for ours, theirs in losses)  # the toy is the same at both sizes
    with pytest.raises(ValueError, match="must sum to `steps` = 5, not 4"):
        SupervisedSettings(**(settings.model_dump() | {"steps": 5}))


def test_the_logical_size_is_what_time_ids_tell_and_the_grid_stays(components):
    rows = SceneRows(2, load_vae(components), PromptEncoder.load(components, "post_norm"))
    plain = rows.batch([0], [0])
    rows.logical_size_px = 1024
    told = rows.batch([0], [0])
    assert plain.size_px.tolist() == [[64.0, 64.0]] and told.size_px.tolist() == [[1024.0, 1024.0]]
    assert told.latents.shape == plain.latents.shape == (1, 4, 8, 8)
    unet, t = build_unet(TINY_MODEL, 64, 8), torch.tensor([0.5])
    velocities = [flow.predict(unet, each.latents, t, each.condition, each.text, each.size_px) for each in (plain, told)]
    assert (velocities[0] - velocities[1]).abs().max() > 1e-5
    assert torch.equal(velocities[0], flow.predict(unet, plain.latents, t, plain.condition, plain.text, 64))


def test_bfloat16_is_arithmetic_alone():
    """Weights, averages and losses stay float32; the loss is near that of float32 and not equal to it."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        settings = JOINT.model_copy(update={"precision": precision})
        recipe = SupervisedRecipe(point_net(), POINTS, settings, (0,))
        losses[precision] = [recipe.step(index)["loss"] for index in range(2)]
        assert {value.dtype for value in [*recipe.unet.state_dict().values(), *recipe.ema.weights.values()]} == {torch.float32}
    assert losses["float32"] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_a_cast_that_a_rollout_made_is_not_the_one_that_trains():
    """Rollouts and training share weights, even in one outer context: every weight still gets its gradient."""
    net, x, t = point_net(), torch.randn(2, 2, 8, 8), torch.tensor([0.3, 0.8])
    text = POINTS.batch([0, 1], [0, 1]).text
    with torch.autocast("cpu", torch.bfloat16):  # an outer context keeps its casts until it ends
        with torch.no_grad():
            flow.predict(net, x, t, torch.zeros_like(x), text, 64, "bfloat16")
        velocity = flow.predict(net, x, t, torch.zeros_like(x), text, 64, "bfloat16")
        gradients = torch.autograd.grad((velocity**2).mean(), list(net.parameters()), allow_unused=True)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    assert velocity.dtype == torch.float32


class Corner:
    """A reward that pulls to larger values."""

    def differentiable(self, images, prompts, sources=None):
        return images.mean((1, 2, 3))


def refl_after(settings: ReFLSettings, steps: int) -> ReFLRecipe:
    rewards = {task: Corner() for task in ("generate", "edit")}
    recipe = ReFLRecipe(point_net(), IDENTITY_VAE, rewards, POINTS, settings, (0, 4))
    recipe.logs = [recipe.step(index) for index in range(steps)]
    return recipe


def test_norm_guard_holds_the_velocity_norm_and_is_off_by_default():
    free = REFL.model_copy(update={"hinge": "none", "reward_weight": 1.0, "velocity_weight": 0.0, "steps": 24})
    ratios = {weight: refl_after(free.model_copy(update={"norm_guard_weight": weight}), 24).logs[-1]["velocity_norm_ratio"] for weight in (0.0, 50.0)}
    assert ratios[0.0] > 1.1 > ratios[50.0]
    velocity, reference = torch.tensor([[3.0, 4.0], [0.6, 0.8]]), torch.tensor([[0.0, 4.0], [0.0, 2.0]])
    torch.testing.assert_close(norm_ratios(velocity, reference), torch.tensor([1.25, 0.5]))


def test_the_measures_of_pictures_tell_what_they_are_named_after():
    grey = torch.full((2, 3, 16, 16), 0.5)
    red, noisy = torch.zeros(2, 3, 16, 16), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    red[:, 0] = 1.0
    found = {name: picture_measures(images) for name, images in (("grey", grey), ("red", red), ("noisy", noisy))}
    assert found["grey"] == pytest.approx({"brightness": 0.5, "saturation": 0.0, "edge_energy": 0.0, "diversity": 0.0})
    assert found["red"]["saturation"] == pytest.approx(1.0)
    assert found["noisy"]["edge_energy"] > 0.1 and found["noisy"]["diversity"] > 0.3
    assert "diversity" not in picture_measures(grey[:1])
    weight = torch.ones(2, 1, 4, 4)
    weight[..., :2] = 2.0  # the left half is the edit
    edited = grey.clone()
    edited[..., :8] = 1.0
    assert change_outside_edit(edited, grey, weight) == 0.0
    assert change_outside_edit(edited.flip(3), grey, weight) == pytest.approx(0.5)
    whole = torch.ones(1, 1, 4, 4)  # a row without a mask, or with one that covers everything
    assert change_outside_edit(grey[:1], edited[:1], whole) is None
    both = torch.cat([weight[:1], whole])
    assert change_outside_edit(torch.cat([grey[:1], 1 - grey[:1]]), torch.cat([grey[:1], 0 * grey[:1]]), both) == 0.0


def test_refl_logs_its_detectors_for_each_task():
    logs = refl_after(REFL, 2).logs
    assert {"brightness_generate", "saturation_generate", "edge_energy_generate", "diversity_generate"} <= set(logs[0])
    assert not any(name.startswith("change_outside_edit") for each in logs for name in each), "no row has a mask"

    class Masked(PointRows):
        def batch(self, *inputs, **options):
            found = super().batch(*inputs, **options)
            found.weight[:, :, 0] = 2.0
            return found

    rewards = {task: Corner() for task in ("generate", "edit")}
    recipe = ReFLRecipe(point_net(), IDENTITY_VAE, rewards, Masked(POINTS.means, 0.2), REFL, (0, 4))
    assert "change_outside_edit_generate" not in recipe.step(0) and recipe.step(1)["change_outside_edit_edit"] > 0


def test_rows_that_do_not_fill_the_last_micro_batch_count_as_rows():
    logs = [{"rows": 8, "reward": 1.0, "diversity": 0.5}, {"rows": 1, "reward": 0.0}]
    assert mean_logs(logs) == {"reward": pytest.approx(8 / 9), "diversity": 0.5}
    uneven = refl_after(REFL.model_copy(update={"batch": 3, "micro_batch": 2}), 1).logs[0]
    assert uneven["diversity_generate"] > 0 and "rows" not in uneven


def test_score_times_are_bounded_and_the_shift_favours_noise():
    drawn = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 0.96 + 0.02
    assert torch.equal(flow.shifted(drawn, 1.0).clamp(0.02, 0.98), drawn)
    moved = flow.shifted(drawn, 3.0).clamp(0.02, 0.98)
    assert moved.min() >= 0.02 and moved.max() <= 0.98 and moved.mean() > drawn.mean() + 0.15
    recipes = [DMD2Recipe(point_net(), POINTS, DMD2.model_copy(update={"score_time_shift": shift}), (0, 5)) for shift in (1.0, 3.0)]
    assert recipes[0].step(0)["loss"] != recipes[1].step(0)["loss"]


def test_latents_that_spread_or_collapse_raise_one_alarm(capfd):
    recipe = DMD2Recipe(point_net(), POINTS, DMD2, (0, 5))
    assert 0.5 < recipe.step(0)["latent_std_ratio"] < 2.0
    for index in range(8):
        recipe._watched(recipe.teacher_std * 1.5, index)
    assert capfd.readouterr().err == ""
    for index in range(8):
        recipe._watched(recipe.teacher_std * 2.5, index)
    said = capfd.readouterr().err
    assert said.count("2.50 times as wide as the teacher's") == 1 and "step 2" in said


@pytest.fixture(scope="module")
def scenes(components):
    return SceneRows(4, load_vae(components), PromptEncoder.load(components, "post_norm"))


def test_the_discriminator_tells_data_from_the_student_s_rows_and_is_off_by_default(scenes, tmp_path):
    plain = DMD2Recipe(build_unet(TINY_MODEL, 64, 8), scenes, DMD2, (0, 5))
    assert set(plain.modules) == {"student", "fake"} and not DMD2.reads_targets
    on = DMD2.model_copy(update={"gan_weight": 1.0, "gan_fake_weight": 1.0, "gan_time_high": 0.3, "fake_learning_rate": 1e-3, "clip_norm": 10.0, "batch": 8, "micro_batch": 8})
    recipe = DMD2Recipe(build_unet(TINY_MODEL, 64, 8), scenes, on, (0, 5))
    before = {name: value.clone() for name, value in recipe.discriminator.state_dict().items()}
    logs = [recipe._fake_step(0, number) for number in range(10)]
    assert logs[-1]["loss_discriminator"] < 0.5 * logs[0]["loss_discriminator"]
    assert logs[-1]["discriminator_accuracy"] > 0.8
    assert any(not torch.equal(value, before[name]) for name, value in recipe.discriminator.state_dict().items())
    metrics = run(recipe, steps=1, output=tmp_path, label="dmd2")
    assert metrics["loss_gan"] > 0 and "discriminator" in torch.load(tmp_path / "state.pt", weights_only=True)["modules"]


def test_the_discriminator_pulls_the_student(scenes):
    """Of two students that saw the same fake score and discriminator, the one that its loss counts for fools it better."""
    fooled, states = {}, {}
    for weight in (1e-12, 10.0):
        settings = DMD2.model_copy(update={"gan_weight": weight, "gan_fake_weight": 1.0, "fake_steps": 4, "fake_learning_rate": 1e-3, "learning_rate": 1e-3})
        recipe = DMD2Recipe(build_unet(TINY_MODEL, 64, 8), scenes, settings, (0, 5))
        recipe.step(0)
        batch = recipe._batch(0, 0)
        with torch.no_grad():
            fooled[weight] = recipe._logits(recipe._student_data(batch, 0, 0, gradient=False), batch, 0).mean().item()
        states[weight] = {name: module.state_dict() for name, module in recipe.modules.items()}
    few, many = states.values()
    assert same(dict(few["fake"]), dict(many["fake"])) and same(dict(few["discriminator"]), dict(many["discriminator"]))
    assert not same(dict(few["student"]), dict(many["student"]))
    assert fooled[10.0] > fooled[1e-12] + 0.1


def test_the_discriminator_reads_the_left_panel_alone(scenes):
    recipe = DMD2Recipe(build_unet(TINY_MODEL, 64, 8), scenes, DMD2.model_copy(update={"gan_weight": 1.0}), (0, 5))
    batch = recipe._batch(0, 0)
    features = middle_features(recipe.fake, batch.latents, torch.full((4,), 0.5), batch, "float32")
    assert features.shape == (4, 64, 4, 4)
    whole = []
    watching = recipe.fake.mid_block.register_forward_hook(lambda *_: whole.append(_[2]))
    flow.predict(recipe.fake, batch.latents, torch.full((4,), 0.5), batch.condition, batch.text, batch.size_px, "float32")
    watching.remove()
    left, right = whole[0].chunk(2, dim=3)
    assert torch.equal(features, left.float()) and not torch.equal(features, right.float())
    assert not recipe.fake.mid_block._forward_hooks, "no hook stays behind"
