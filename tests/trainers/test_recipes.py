"""Each recipe learns what it should, moves only the networks it should, and resumes bit for bit.
Tiny networks on real batches of the small world."""

import copy
import dataclasses

import pytest
import torch
from PIL import Image

from tests.trainers.conftest import TINY_MODEL
from tests.trainers.synthetic import SceneRows
from tests.trainers.toys import IDENTITY_VAE, PointNet, PointRows
from trainers import flow, stages
from trainers.batch_plan import Plan
from trainers.conditioning import EDIT_TEMPLATE, GENERATE_TEMPLATE, Embeddings, PromptEncoder
from trainers.data import Row, drop_conditions, foreground
from trainers.loop import Ema, run
from trainers.model import build_unet, load_unet, load_vae
from trainers.recipes import refl
from trainers.recipes.dmd2 import DMD2Recipe, matching_gradient
from trainers.recipes.refl import ReFLRecipe, hinge_loss
from trainers.recipes.supervised import SupervisedRecipe
from trainers.settings import DMD2Settings, ReFLSettings, SupervisedSettings

JOINT = SupervisedSettings(tasks={"generate": 0.5, "edit": 0.5}, datasets=("t2i", "edit"), steps=6, batch=4, warmup_steps=1)
POINTS = PointRows(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), 0.2)


@pytest.fixture(scope="module")
def rows(components):
    return SceneRows(12, load_vae(components), PromptEncoder.load(components, "post_norm"))


def fresh(seed=0):
    return build_unet(TINY_MODEL, 64, 8, seed)


def test_supervised_overfits_a_batch_and_a_frozen_network_does_not(rows):
    """Four rows whose latents have a spread of 1: a network that knows nothing has a loss of 1 + 1."""
    few = SceneRows.__new__(SceneRows)
    few.__dict__ |= rows.__dict__ | {"by_task": {task: found[:2] for task, found in rows.by_task.items()}, "latents": copy.copy(rows.latents)}
    few.latents.values = {name: (value - value.mean()) / value.std() for name, value in rows.latents.values.items()}
    settings = JOINT.model_copy(
        update={"steps": 60, "learning_rate": 2e-3, "drop_text": 0.0, "drop_both_edit": 0.0, "warmup_steps": 5, "foreground_weight": False}
    )
    losses = [metrics["loss"] for metrics in _steps(SupervisedRecipe(fresh(), few, settings, (0,)), 60)]
    assert sum(losses[-20:]) / 20 < 0.5 * 2 < 1.7 < losses[0]
    frozen = settings.model_copy(update={"learning_rate": 1e-12})
    still = [metrics["loss"] for metrics in _steps(SupervisedRecipe(fresh(), few, frozen, (0,)), 20)]
    assert sum(still) / 20 > 1.7


def test_the_right_panel_reaches_the_network_as_it_is(rows):
    """Zeros or the source, at any time, while the left one is noised."""
    recipe, fed = SupervisedRecipe(fresh(), rows, JOINT.model_copy(update={"drop_both_edit": 0.0, "micro_batch": 4}), (0,)), []
    recipe.unet.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0].detach().clone()))
    recipe.step(0)
    batch = rows.batch(*recipe.plans[0].indices(0))
    left, right = fed[0].chunk(2, dim=3)
    assert len(fed) == 1 and torch.equal(right, batch.condition) and batch.condition[batch.is_edit].abs().amax() > 0
    assert all((left[row] - batch.latents[row]).abs().mean() > 1e-3 for row in range(4))


def test_resume_is_bit_exact_and_a_lost_optimizer_is_noticed(rows, tmp_path):
    whole = SupervisedRecipe(fresh(), rows, JOINT, (1,))
    run(whole, steps=6, output=tmp_path / "whole", label="whole")
    run(SupervisedRecipe(fresh(), rows, JOINT, (1,)), steps=3, output=tmp_path / "parts", label="first half")
    second = SupervisedRecipe(fresh(seed=9), rows, JOINT, (1,))
    run(second, steps=6, output=tmp_path / "parts", label="second half")
    assert all(torch.equal(whole.ema.weights[name], second.ema.weights[name]) for name in whole.ema.weights)
    assert _equal(whole.unet, second.unet)
    assert (tmp_path / "whole/metrics.jsonl").read_text() .count("\n") >= 5
    state = torch.load(tmp_path / "parts/state.pt", weights_only=True)
    assert state["position"] == 6
    # Negative control: without the optimizer's moments the second half goes elsewhere.
    run(SupervisedRecipe(fresh(), rows, JOINT, (1,)), steps=3, output=tmp_path / "lossy", label="first half")
    lossy = SupervisedRecipe(fresh(), rows, JOINT, (1,))
    lossy.unet.load_state_dict(torch.load(tmp_path / "lossy/state.pt", weights_only=True)["modules"]["unet"])
    for index in range(3, 6):
        lossy.step(index)
    assert not _equal(whole.unet, lossy.unet)


def test_non_finite_loss_stops_with_the_step(rows, tmp_path):
    recipe = SupervisedRecipe(fresh(), rows, JOINT, (1,))
    with torch.no_grad():
        next(recipe.unet.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 0"):
        run(recipe, steps=2, output=tmp_path, label="broken")


def test_plan_counts_tasks_exactly_and_shows_each_row_once_an_epoch(rows):
    plan = Plan(rows.pools(), {"generate": 0.5, "edit": 0.5}, 4, (0,))
    seen = []
    for step in range(6):  # 6 batches x 2 rows = 12 rows of each task: one epoch
        indices, positions = plan.indices(step)
        tasks = [rows.rows[index].task for index in indices]
        assert tasks.count("generate") == tasks.count("edit") == 2
        assert positions == list(range(4 * step, 4 * step + 4))
        seen += indices
    assert sorted(seen) == list(range(24))
    assert plan.indices(6)[0] != plan.indices(0)[0], "a new epoch has an order of its own"
    with pytest.raises(ValueError, match="exactly"):
        Plan(rows.pools(), {"generate": 0.5, "edit": 0.5}, 5, (0,))


def test_drop_out_rates_are_the_settings_and_repeat_on_resume():
    """20,000 rows of each task, of which 10 %, 5 % and 5 % are dropped, each within three deviations; later rows draw as in one batch."""
    settings = JOINT.model_copy(update={"drop_text": 0.1, "drop_text_edit": 0.05, "drop_both_edit": 0.05})
    total, shares = 20_000, {}
    for task in ("generate", "edit"):
        index = POINTS.by_task[task][0]
        batch = POINTS.batch([index] * total, list(range(total)), with_target=False)
        full = Embeddings(torch.ones_like(batch.text.states), batch.text.mask)  # the null states are zeros
        batch = dataclasses.replace(batch, text=full, condition=torch.ones_like(batch.condition))
        dropped = drop_conditions(batch, settings, (7,))
        is_null, blank = dropped.text.states[:, 0, 0] == 0, dropped.condition.abs().amax((1, 2, 3)) == 0
        later = drop_conditions(batch.split(total // 2)[1], settings, (7,))
        assert torch.equal(later.text.states, dropped.text.states[total // 2 :]) and torch.equal(later.condition, dropped.condition[total // 2 :])
        assert not (blank & ~is_null).any(), "the source is never dropped alone: inference never does"
        shares |= {(task, "text"): (is_null & ~blank).float().mean().item(), (task, "both"): blank.float().mean().item()}
    assert shares.pop(("generate", "both")) == 0
    expected = {("generate", "text"): 0.1, ("edit", "text"): 0.05, ("edit", "both"): 0.05}
    assert all(abs(shares[name] - share) < 3 * (share * (1 - share) / total) ** 0.5 for name, share in expected.items())


def test_the_null_prompt_is_the_template_without_its_task(components, monkeypatch):
    """What the pipelines feed as the negative prompt: the bare template, with no `[Generate]` or `[Edit]` before the empty text."""
    encoder = PromptEncoder.load(components, "post_norm")
    fed = []
    monkeypatch.setattr(encoder, "_kept", lambda ids, mask, drop, **vision: fed.append(encoder.tokenizer.decode(ids[0][mask[0].bool()])))
    image = Image.new("RGB", (64, 64))
    encoder.generate([None])
    encoder.edit([image], [None])
    encoder.generate([""])
    assert fed[0] == GENERATE_TEMPLATE.replace("{}", "")
    assert fed[1].replace("<|image_pad|>", "") == EDIT_TEMPLATE.replace("{}", "").replace("<|image_pad|>", "")
    assert "[Generate]" in fed[2], "an empty prompt is not the null prompt"


def test_foreground_weight_values():
    def row(cells):
        return Row("r", "edit", "t", "s", "x", None, bytes([255] * cells + [0] * (64 - cells)))

    assert foreground(row(32), (8, 8)).max().item() == pytest.approx(2.0)
    assert foreground(row(64), (8, 8)).unique().tolist() == [1.0]
    assert foreground(row(16), (8, 8)).max().item() == pytest.approx(3.0)
    assert foreground(row(1), (8, 8), cap=5.0).max().item() == 5.0
    assert foreground(dataclasses.replace(row(0), edit_mask=None), (8, 8)).unique().tolist() == [1.0]


def test_ema_matches_its_closed_form():
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, 0.0)
    ema, expected = Ema(module, 0.5), 0.0
    for step in range(1, 6):
        torch.nn.init.constant_(module.weight, float(step))
        ema.update(module)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.weights["weight"].item() == pytest.approx(expected, rel=1e-6)


class Brightness:
    """A reward whose truth is plain: mean pixel value."""

    def differentiable(self, images, prompts, sources=None):
        return images.mean((1, 2, 3))


def test_refl_raises_a_known_reward(rows, components):
    settings = ReFLSettings(
        steps=16, batch=4, rollout_steps=4, hinge="none", reward_weight=1.0, velocity_weight=0.0, learning_rate=1e-3, sigma_high=1.0
    )
    rewards = {task: Brightness() for task in ("generate", "edit")}
    recipe = ReFLRecipe(fresh(), load_vae(components), rewards, rows, settings, (0,))
    values = [metrics.get("reward_generate_scaled") for metrics in _steps(recipe, 16)]
    values = [value for value in values if value is not None]
    rise = sum(values[-2:]) / 2 - sum(values[:2]) / 2
    assert rise > 0.5


def test_hinge_sides():
    reward = torch.tensor([0.0, 3.0])
    assert hinge_loss(reward, "cap", 1.0)[0].item() == pytest.approx(0.5)
    assert hinge_loss(reward, "above", 1.0)[0].item() == pytest.approx(-1.0)
    assert hinge_loss(reward, "cap", 1.0)[1] == 0.5


def test_the_matching_gradient_points_at_the_teacher_and_is_nothing_where_the_scores_agree():
    """Student N(b, 1), teacher N(m, 1): E[g] must move b towards m (here b = 0, m = 2)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, 1, 1, generator=generator)
    t = 0.5
    noisy = (1 - t) * x + t * torch.randn(x.shape, generator=generator)

    def denoise(mean):
        variance = (1 - t) ** 2 + t**2
        return mean + (1 - t) / variance * (noisy - (1 - t) * mean)

    descent = -matching_gradient(x, denoise(2.0), denoise(0.0)).mean().item()
    assert descent > 0.2
    assert matching_gradient(x, denoise(0.0), denoise(0.0)).abs().max().item() == 0.0


def test_dmd2_moves_student_and_fake_and_nothing_else(rows):
    settings = DMD2Settings(steps=2, batch=4, fake_steps=2, fake_warmup_steps=0)
    teacher = fresh()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    recipe = DMD2Recipe(teacher, rows, settings, (0,))
    metrics = recipe.step(0)
    assert all(torch.equal(before[name], value) for name, value in recipe.teacher.state_dict().items())
    assert not _equal(recipe.student, recipe.teacher)
    assert not _equal(recipe.fake, recipe.teacher)
    assert not _equal(recipe.fake, recipe.student)
    assert metrics["gradient_norm"] > 0
    student = {name: value.clone() for name, value in recipe.student.state_dict().items()}
    recipe._fake_step(1, 0)
    assert all(torch.equal(student[name], value) for name, value in recipe.student.state_dict().items())


def test_the_checkpoint_of_a_stage_holds_the_average(components, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "TrainingRows", lambda *_, vae, encoder, **__: SceneRows(4, vae, encoder))
    monkeypatch.setattr(stages, "find_version", lambda *_: (1, "digest"))
    settings = SupervisedSettings(tasks={"generate": 1.0}, datasets=("t2i",), steps=2, batch=2, micro_batch=2, warmup_steps=0)
    stages.train_stage(
        "t2i", settings, TINY_MODEL, components=components, parent=None, lake=None, datasets={"t2i": 1}, output=tmp_path, seed=0
    )
    state, saved = torch.load(tmp_path / "state.pt", weights_only=True), load_unet(tmp_path / "checkpoint").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in state["ema"].items())
    assert not all(torch.equal(value, saved[name]) for name, value in state["modules"]["unet"].items()), "not the last weights"


def test_dmd2_takes_five_fake_steps_for_each_of_the_student_and_each_moves_its_own():
    """Over 50 steps: what an optimizer steps on changes, and nothing else does at that moment."""
    torch.manual_seed(0)
    settings = DMD2Settings(steps=50, batch=2, micro_batch=2, fake_steps=5, fake_warmup_steps=0)
    recipe = DMD2Recipe(PointNet(2, width=8), POINTS, settings, (0, 5))
    counts = {"student": 0, "fake": 0}
    nets = {"student": recipe.student, "fake": recipe.fake, "teacher": recipe.teacher}

    def counted(name, step):
        def call():
            before = {other: [value.clone() for value in net.state_dict().values()] for other, net in nets.items()}
            step()
            counts[name] += 1
            for other, net in nets.items():
                same = all(torch.equal(a, b) for a, b in zip(before[other], net.state_dict().values(), strict=True))
                assert same == (other != name), f"{other} at a step of {name}"

        return call

    for name, optimizer in recipe.optimizers.items():
        optimizer.step = counted(name, optimizer.step)
    for index in range(50):
        recipe.step(index)
    assert counts == {"student": 50, "fake": 250}
    assert recipe.ema.updates == 50, "the average follows the student alone"


class Weighed(torch.nn.Module):
    """A reward with a weight of its own that would take a gradient."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def differentiable(self, images, prompts, sources=None):
        return self.weight * (images[:, 0] ** 2).mean((1, 2))


def test_refl_differentiates_one_step_of_the_rollout_and_nothing_else(monkeypatch):
    """Against finite differences along a random direction: equal where the rollout is held, and not where it moves along."""
    # These points lie far outside the range of images, where the gradient goes straight through and a difference sees the clamp.
    monkeypatch.setattr(refl, "straight_through_clamp", lambda values, *bounds: values)
    torch.manual_seed(0)
    reward = Weighed()
    settings = ReFLSettings(
        steps=1, batch=2, micro_batch=2, rollout_steps=4, sigma_high=1.0, hinge="none", reward_weight=1.0, velocity_weight=0.0,
        clip_norm=1e9, learning_rate=1e-9, guidance_scale=2.0,
    )  # fmt: skip
    recipe = ReFLRecipe(PointNet(2), IDENTITY_VAE, dict.fromkeys(("generate", "edit"), reward), POINTS, settings, (0, 4))
    graded = []
    recipe.unet.register_forward_pre_hook(lambda *_: graded.append(torch.is_grad_enabled()))
    draw = next(seed for seed in range(99) if int(flow.keyed_uniform((0, seed, 5), [0], 1).item() * 4) == 2)
    recipe.key = (0, draw)
    recipe.step(0)
    assert graded.count(True) == 1 and graded.count(False) == 2 * 2, "two guided steps without a graph, then one with"
    assert reward.weight.grad is None and all(value.grad is None for value in recipe.reference.parameters())
    gradient = [parameter.grad.clone() for parameter in recipe.unet.parameters()]
    batch = recipe._batch("generate", 0)
    held = recipe._rollout(recipe.unet, batch, 2)
    direction = [torch.randn(value.shape, generator=torch.Generator().manual_seed(3)) for value in gradient]
    slope = sum((a * b).sum() for a, b in zip(gradient, direction, strict=True)).item()

    def loss_at(distance, rollout):
        with torch.no_grad():
            for parameter, along in zip(recipe.unet.parameters(), direction, strict=True):
                parameter.add_(distance * along)
            x = rollout()
            velocity = recipe._predict(recipe.unet, x, torch.full((2,), recipe._sigmas(batch)[2]), batch)
            found = reward.differentiable((x - recipe._sigmas(batch)[2] * velocity + 1) / 2, None).mean()
            for parameter, along in zip(recipe.unet.parameters(), direction, strict=True):
                parameter.sub_(distance * along)
        return -(found.item() - recipe.baseline["generate"][0]) / recipe.baseline["generate"][1]

    def difference(rollout):
        return (loss_at(1e-3, rollout) - loss_at(-1e-3, rollout)) / 2e-3

    assert slope == pytest.approx(difference(lambda: held), rel=0.01)
    assert slope != pytest.approx(difference(lambda: recipe._rollout(recipe.unet, batch, 2)), rel=0.05)


def _steps(recipe, count):
    for index in range(count):
        yield recipe.step(index)


def _equal(first, second):
    other = second.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.state_dict().items())
