"""An adapter trains alone, resumes bit for bit, and is what diffusers loads: the stock pipeline with it draws what we draw.
Without it the base is as it was; a merged checkpoint is the two together."""

import pytest
import torch
from diffusers import DreamLitePipeline
from safetensors import safe_open

from tests.trainers.conftest import TINY_MODEL
from tests.trainers.synthetic import SceneRows
from tests.trainers.test_pipelines import INSTRUCTIONS, PROMPTS, SOURCES, own_latents
from tests.trainers.test_recipes import JOINT, Brightness
from trainers.conditioning import PromptEncoder
from trainers.flow import keyed_normal
from trainers.inference import Sampler
from trainers.loop import run
from trainers.lora import ADAPTER_FILE, add_lora, frozen_copy, has_adapter, merge_lora, save_lora, trainable, trainable_copy
from trainers.model import build_unet, load_unet, load_vae
from trainers.recipes.dmd2 import DMD2Recipe
from trainers.recipes.refl import ReFLRecipe
from trainers.recipes.supervised import SupervisedRecipe
from trainers.settings import DMD2Settings, LoraSettings, ReFLSettings

LORA = LoraSettings(rank=4, alpha=8)
SETTINGS = JOINT.model_copy(update={"lora": LORA, "learning_rate": 1e-2})


@pytest.fixture(scope="module")
def rows(components):
    return SceneRows(12, load_vae(components), PromptEncoder.load(components, "post_norm"))


def adapted(seed=1, unet=None):
    unet = unet or build_unet(TINY_MODEL, 64, 8, seed)
    add_lora(unet, LORA, seed=0)
    return unet


def test_the_stock_pipeline_with_the_adapter_draws_what_the_trained_network_draws(checkpoints, rows, tmp_path):
    base = checkpoints["base"]
    unet = adapted(unet=load_unet(base))
    recipe = SupervisedRecipe(unet, rows, SETTINGS, (0,))
    run(recipe, steps=6, output=tmp_path, label="lora")
    recipe.ema.copy_to(unet)
    save_lora(unet, tmp_path / "adapter")
    sampler = Sampler.load(base)
    noise = keyed_normal((1,), [5], (4, 8, 8))
    stock = DreamLitePipeline.from_pretrained(base)
    stock.set_progress_bar_config(disable=True)
    stock.prepare_latents = lambda *_arguments, **_keywords: noise.clone()
    for edit in (False, True):
        plain = own_latents(sampler, noise, edit=edit, steps=4, scale=3.5, image_scale=1.5)
        sampler.unet = unet.eval()
        ours = own_latents(sampler, noise, edit=edit, steps=4, scale=3.5, image_scale=1.5)
        sampler.unet = load_unet(base).eval()

        def theirs(edit=edit):
            return stock(
                (INSTRUCTIONS if edit else PROMPTS)[0], height=64, width=64, num_inference_steps=4, output_type="latent",
                guidance_scale=3.5, image_guidance_scale=1.5, **({"image": SOURCES[0]} if edit else {}),
            ).images  # fmt: skip

        before = theirs()
        stock.unet.load_lora_adapter(tmp_path / "adapter", weight_name=ADAPTER_FILE, prefix="unet")
        torch.testing.assert_close(theirs(), ours, atol=1e-5, rtol=1e-5)
        assert (ours - plain).abs().max() > 1e-2, "training moved the network"
        stock.unet.disable_adapters()
        assert torch.equal(theirs(), before), "the adapter off is the base"
        stock.unet.unload_lora()
    merge_lora(unet)
    sampler.unet = unet
    merged = own_latents(sampler, noise, edit=True, steps=4, scale=3.5, image_scale=1.5)
    torch.testing.assert_close(merged, ours, atol=1e-4, rtol=1e-4)
    assert set(unet.state_dict()) == set(load_unet(base).state_dict()), "a merged network is a plain one"


def test_only_the_adapter_trains_and_only_it_is_kept_for_resume(rows, tmp_path):
    whole = SupervisedRecipe(adapted(), rows, SETTINGS, (1,))
    before = {name: value.clone() for name, value in whole.unet.state_dict().items()}
    run(whole, steps=4, output=tmp_path / "whole", label="whole")
    moved = {name for name, value in whole.unet.state_dict().items() if not torch.equal(before[name], value)}
    assert moved and all("lora_" in name for name in moved)
    run(SupervisedRecipe(adapted(), rows, SETTINGS, (1,)), steps=2, output=tmp_path / "parts", label="first half")
    second = SupervisedRecipe(adapted(), rows, SETTINGS, (1,))
    run(second, steps=4, output=tmp_path / "parts", label="second half")
    assert all(torch.equal(whole.ema.weights[name], second.ema.weights[name]) for name in whole.ema.weights)
    state = torch.load(tmp_path / "parts/state.pt", weights_only=True)
    assert {name for name in state["modules"]["unet"]} == set(state["ema"]) == {name for name in before if "lora_" in name}
    # Negative control: a state of an adapter of another shape is refused, not half loaded.
    other = build_unet(TINY_MODEL, 64, 8, 1)
    add_lora(other, LoraSettings(rank=4, target_modules=("to_q", "to_k")), seed=0)
    with pytest.raises(ValueError, match="another network or adapter"):
        run(SupervisedRecipe(other, rows, SETTINGS, (1,)), steps=5, output=tmp_path / "parts", label="other")


def test_a_fresh_adapter_changes_nothing_and_shares_its_base():
    plain = build_unet(TINY_MODEL, 64, 8, 1)
    wanted = {name: value.clone() for name, value in plain.state_dict().items()}
    unet = adapted(unet=plain)
    reference, student = frozen_copy(unet), trainable_copy(unet)
    assert not has_adapter(reference) and not trainable(reference)
    assert all(torch.equal(wanted[name], value) for name, value in reference.state_dict().items())
    own = {value.data_ptr() for value in unet.state_dict().values()}
    assert all(value.data_ptr() in own for value in reference.parameters()), "the reference costs no weights"
    assert all(parameter.data_ptr() not in own for parameter in trainable(student)), "the student's adapter is its own"
    copied = frozen_copy(build_unet(TINY_MODEL, 64, 8, 1))
    assert all(torch.equal(wanted[name], value) for name, value in copied.state_dict().items()) and not trainable(copied)


def test_refl_trains_an_adapter_towards_a_known_reward(rows, components):
    settings = ReFLSettings(
        steps=16, batch=4, rollout_steps=4, hinge="none", reward_weight=1.0, velocity_weight=0.0, learning_rate=1e-2, sigma_high=1.0, lora=LORA
    )
    rewards = {task: Brightness() for task in ("generate", "edit")}
    recipe = ReFLRecipe(adapted(0), load_vae(components), rewards, rows, settings, (0,))
    found = [recipe.step(index) for index in range(16)]
    values = [metrics["reward_generate_scaled"] for metrics in found if "reward_generate_scaled" in metrics]
    assert found[0]["drift"] == 0.0, "the start model is the network without its adapter"
    assert sum(values[-2:]) / 2 - sum(values[:2]) / 2 > 0.3


def test_dmd2_trains_two_adapters_on_one_base(rows):
    settings = DMD2Settings(steps=2, batch=4, fake_steps=2, fake_warmup_steps=0, lora=LORA)
    recipe = DMD2Recipe(adapted(), rows, settings, (0,))
    teacher = {name: value.clone() for name, value in recipe.teacher.state_dict().items()}
    recipe.step(0)
    assert all(torch.equal(teacher[name], value) for name, value in recipe.teacher.state_dict().items())
    trained = [torch.cat([parameter.detach().flatten() for parameter in trainable(net)]) for net in (recipe.student, recipe.fake)]
    assert not torch.equal(*trained)
    assert set(recipe.ema.weights) == {name for name in recipe.student.state_dict() if "lora_" in name}
    shared = {value.data_ptr() for value in recipe.teacher.parameters()}
    for net in (recipe.student, recipe.fake):
        assert all(value.data_ptr() in shared for value in net.parameters() if not value.requires_grad)


@pytest.mark.parametrize(
    ("targets", "words"), [(("to_quick",), "no layer of the UNet is called so"), (("norm1",), "is a "), (("depthwise",), "depthwise")]
)
def test_a_target_that_cannot_be_is_one_sentence(targets, words):
    with pytest.raises(ValueError, match=words) as caught:
        add_lora(build_unet(TINY_MODEL, 64, 8), LoraSettings(target_modules=targets), seed=0)
    assert "\n" not in str(caught.value)


def test_the_file_says_its_rank_and_scale_and_where_its_base_is_from(tmp_path):
    save_lora(adapted(), tmp_path, {"origin": "/home/me/base", "licence": "CC-BY-NC-4.0"})
    with safe_open(tmp_path / ADAPTER_FILE, "pt") as opened:
        assert all(name.startswith("unet.") and ".lora_" in name for name in opened.keys())
        assert '"unet.lora_alpha": 8' in opened.metadata()["lora_adapter_metadata"]
        assert (opened.metadata()["base"], opened.metadata()["licence"]) == ("base", "CC-BY-NC-4.0")
