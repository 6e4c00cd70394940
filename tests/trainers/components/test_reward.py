"""The small world's reward trainer: labels that are true, pairs that point the right way, checkpoints that load.
Learning itself is measured by `build_reward`; here a few steps show that every loss moves."""

import dataclasses

import numpy as np
import pytest
import torch

from dreamlite_data import scenes
from dreamlite_data.rewards import RewardScores, load_reward
from trainers.components import reward, reward_pairs
from trainers.components.reward_measure import calibration_error, edit_pairs, generate_pairs, pair_accuracy
from trainers.components.reward_pairs import Row


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scene(seed: int = 0, count: int = 2) -> scenes.Scene:
    return scenes.sample_scene(np.random.default_rng(seed), count)


def test_a_right_caption_has_no_mistake_and_each_variant_has_some():
    rng = np.random.default_rng(0)
    for seed in range(20):
        first = scene(seed)
        assert reward_pairs.mistakes(first, scenes.parse_caption(scenes.caption(first, rng))) == 0
        for kind in reward_pairs.VARIANTS:
            other, _ = reward_pairs.vary(first, rng, kind)
            assert (reward_pairs.mistakes(first, other) > 0) == (first.key() != other.key())


@pytest.mark.parametrize("kind", scenes.EDIT_KINDS)
def test_edit_mistakes_tell_what_was_asked_from_what_was_to_stay(kind):
    rng = np.random.default_rng(1)
    for seed in range(20):
        source = scene(seed)
        edit = scenes.sample_edit(source, rng, kind)
        target = scenes.apply_edit(source, edit)
        assert reward_pairs.edit_mistakes(source, edit, target) == (0, 0)
        undone, kept = reward_pairs.edit_mistakes(source, edit, source)
        assert undone > 0 and kept == 0  # nothing done, nothing broken
        extra = scenes.apply_edit(target, scenes.sample_edit(target, rng, "background"))
        if kind != "background":
            assert reward_pairs.edit_mistakes(source, edit, extra) == (0, 2)


def test_token_labels_lie_where_the_object_is():
    item = scenes.SceneObject("red", "circle", "large", "bottom right")
    labels = reward_pairs.token_labels(scenes.Scene((item,), "white", "plain")).reshape(3, 3, 4)
    covered = labels[..., 3] > 0
    assert covered[2, 2] and not covered[:2].any() and not covered[:, :2].any()
    assert tuple(labels[2, 2]) == (1, 1, 2, 9)


def test_caption_sites_say_what_the_image_shows_not_what_the_words_say():
    said, shown = scene(3), scene(4)
    text = scenes.caption(said, np.random.default_rng(0))
    sites = reward_pairs.caption_sites(text, shown)
    assert len(sites) == len(said.objects) + 1
    for end, labels in sites:
        if "colour" in labels:
            place = text[:end].split(" at the ")[-1]
            there = [item for item in shown.objects if item.position == place]
            assert labels["colour"] == (1 + list(scenes.COLOURS).index(there[0].colour) if there else 0)
        else:
            assert text[:end].endswith("background") and labels["style"] == list(scenes.STYLES).index(shown.style)


def test_pairs_point_from_fewer_mistakes_to_more_within_group_and_head():
    def row(group, wrong, fault=0):
        return Row((0,), ["a", "b"], [0, 0], wrong, group, fault, [[], []], [{}, {}])

    rows = [row(0, [0, 3]), row(0, [1, 3], fault=2), row(1, [5, 0])]
    better, worse = reward.preferred_pairs(rows)
    found = set(zip(better.tolist(), worse.tolist(), strict=True))
    # 2 is spoilt with one mistake, 1 is clean with three: neither dominates. Row 2 is of another group.
    assert found == {(0, 1), (0, 2), (0, 3), (1, 3), (2, 3), (5, 4)}


def test_ranking_loss_equals_sampling_and_falls_with_the_margin():
    generator = torch.Generator().manual_seed(0)
    better, worse = torch.tensor([[1.0, -0.5]]), torch.tensor([[0.2, 0.3]])
    noise = torch.randn(400_000, generator=generator) * (torch.exp(better[0, 1]) ** 2 + torch.exp(worse[0, 1]) ** 2).sqrt()
    sampled = -torch.nn.functional.logsigmoid(0.8 + noise).mean()
    assert reward.ranking_loss(better, worse).item() == pytest.approx(sampled.item(), abs=3e-3)
    assert reward.ranking_loss(better + torch.tensor([2.0, 0.0]), worse) < reward.ranking_loss(better, worse)
    assert reward.ranking_loss(worse, better) > reward.ranking_loss(better, worse)


def test_training_never_sees_a_held_out_scene():
    rng = np.random.default_rng(0)
    drawn = {draw.key() for draw in (reward_pairs.draw_scene(rng, measured=False) for _ in range(300))}
    measured = {draw.key() for draw in (reward_pairs.draw_scene(rng, measured=True) for _ in range(50))}
    assert not drawn & measured


def test_measured_pairs_cover_every_kind_of_wrong():
    kinds = {pair.kind for pair in generate_pairs(18, seed=0)}
    assert {f"spoilt_{name}" for name in reward_pairs.DEGRADATIONS} <= kinds
    assert {"words_recolour", "image_resize", "words_style", "image_other"} <= kinds
    assert {"no_op", "wrong_value", "other_scene", "extra_change"} <= {pair.kind for pair in edit_pairs(36, seed=0)}


def test_each_head_is_asked_about_what_it_should_see():
    heads = {}
    for pair in edit_pairs(72, seed=1):
        heads.setdefault(pair.kind.split("_")[0], set()).add(pair.heads)
    # (followed, kept): nothing done breaks nothing; a spoilt or further changed target is as asked; the source never is.
    assert heads["no"] == {(True, False)} and heads["edit"] == {(True, False)}
    assert heads["spoilt"] == {(False, True)} and heads["extra"] == {(False, True)}
    assert (True, True) in heads["wrong"] | heads["other"]


def test_calibration_error_is_nought_for_a_model_that_is_as_sure_as_it_is_right():
    generator = np.random.default_rng(0)
    count = 40_000
    difference = generator.normal(0, 2, count)
    mu = np.zeros(2 * count, np.float32)
    mu[0::2] = difference
    spread = np.full(2 * count, np.log(0.7), np.float32)
    sure = reward.normal_mean(torch.sigmoid, torch.tensor(difference), torch.full((count,), 0.7 * 2**0.5, dtype=torch.float64)).numpy()
    wins = generator.random(count) < sure
    flipped = mu.reshape(-1, 2)
    flipped[~wins] = flipped[~wins][:, ::-1]  # the side that won is put first, as in pairs of right and wrong
    scores = RewardScores(mu, spread, np.zeros((2 * count, 1, 2)), (None,) * (2 * count), np.ones(2 * count, int))
    assert calibration_error(scores) < 0.01
    certain = dataclasses.replace(scores, mu=5 * mu)
    assert calibration_error(certain) > 0.05  # surer than it is right


@pytest.mark.parametrize(("kind", "expected"), [("generate", "hpsv3"), ("edit", "editreward")])
def test_a_few_steps_train_and_save_a_loadable_reward(tmp_path, monkeypatch, kind, expected):
    monkeypatch.setitem(reward.GROUPS, kind, 3)
    told = reward.build_reward(kind, tmp_path / "one", seed=3, steps=2)
    assert [each["step"] for each in told["curve"]] == [2] and {"rank", "image", "site", "reward"} <= set(told["curve"][0])
    model = load_reward(tmp_path / "one")
    assert model.kind == expected
    metrics = pair_accuracy(tmp_path / "one", rows=6, seed=0)
    assert 0 <= metrics["pair_accuracy"] <= 1 and ("follow_accuracy" in metrics) == (kind == "edit")


def test_the_vision_tower_rests_once_the_decoder_learns(tmp_path):
    torch.manual_seed(0)
    trainee = reward.prepare("generate", tmp_path)
    pictures, rows = reward_pairs.generate_batch(2, np.random.default_rng(0))
    sum(trainee.losses(pictures, rows).values()).backward()
    assert all(parameter.grad is None for parameter in trainee.network.backbone.visual.parameters())
    trainee.vision_loss(pictures)["vision"].backward()
    assert all(parameter.grad is not None for parameter in trainee.network.backbone.visual.parameters())


def test_the_seed_decides_every_weight(tmp_path, monkeypatch):
    monkeypatch.setitem(reward.GROUPS, "generate", 2)
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        reward.build_reward("generate", tmp_path / name, seed=seed, steps=1)
    ids = [load_reward(tmp_path / name).scorer_id for name in ("one", "two", "three")]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("kind", ["generate", "edit"])
def test_training_and_scoring_run_the_same_forward_pass(tmp_path, kind):
    torch.manual_seed(0)
    trainee = reward.prepare(kind, tmp_path).eval()
    draw = reward_pairs.generate_batch if kind == "generate" else reward_pairs.edit_batch
    pictures, rows = draw(2, np.random.default_rng(0))
    for picture in pictures:
        picture.pixels = np.rint(picture.pixels)
    with torch.inference_mode():
        text, _ = trainee.pack(rows)
        shown = trainee.features(pictures)[torch.tensor([row.pictures for row in rows])].flatten(0, 2)
        hidden = trainee.network.hidden_states(shown, text)
        trained = trainee.heads(hidden[torch.arange(len(rows))[:, None], text.reward_index], rows)
    reward.save(trainee, tmp_path)
    model = load_reward(tmp_path)
    from trainers.components.reward_measure import as_image

    images, prompts, sources, wanted = [], [], [], []
    trained = trained.view(len(rows), -1, 2).numpy()
    for row, scores in zip(rows, trained, strict=True):
        for number, prompt in enumerate(row.prompts[:1] if kind == "edit" else row.prompts):
            images.append(as_image(pictures[row.pictures[-1]]))
            sources.append(as_image(pictures[row.pictures[0]]))
            prompts.append(prompt)
            wanted.append(scores if kind == "edit" else scores[number : number + 1])
    found = model.score(images, prompts, sources if kind == "edit" else None).heads
    # Training resizes 64 px to 72 px in float, as the differentiable path does: there the two are one forward pass.
    floats = [torch.from_numpy(np.stack([np.asarray(each) for each in group])).permute(0, 3, 1, 2) / 255 for group in (images, sources)]
    with torch.no_grad():
        tensor_path = model.heads_of_tensor(floats[0], prompts, floats[1] if kind == "edit" else None).numpy()
    np.testing.assert_allclose(tensor_path, np.stack(wanted), rtol=0, atol=2e-5)
    # Scoring resizes in 8 bits: 7e-4 seen.
    np.testing.assert_allclose(found, np.stack(wanted), rtol=0, atol=2e-3)


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no reward is called 'video'"):
        reward.build_reward("video", tmp_path, steps=1)
