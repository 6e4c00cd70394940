"""Our checkpoints are the stock pipelines' checkpoints: they load there, and both draw the same image.
The batched sampler is held to the stock latents, for both tasks, guided and distilled."""

import numpy as np
import pytest
import torch
from diffusers import DreamLiteMobilePipeline, DreamLitePipeline

from dreamlite_data import scenes
from trainers.conditioning import GENERATE_PROMPT, GENERATE_TOKENS, PromptEncoder, as_image
from trainers.flow import SCHEDULER_CONFIG, deployed_sigmas, guided_velocity, keyed_normal, sample
from trainers.inference import Sampler

PROMPT = "a small red circle at the top left on a plain grey background"
PROMPTS = [PROMPT, "a plain navy background with a large cyan cross at the center"]
INSTRUCTIONS = ["make the red circle blue", "remove it"]
SOURCES = [as_image(scenes.render(scenes.sample_scene(np.random.default_rng(seed)))) for seed in (3, 4)]


def own_latents(sampler, noise, *, edit, steps, scale, image_scale):
    """Latents of the first row or of both, drawn as one batch."""
    encoder, rows = sampler.encoder, len(noise)
    if edit:
        sources, condition = SOURCES[:rows], sampler.encode_images(SOURCES[:rows])
        text, null = encoder.edit(sources, INSTRUCTIONS[:rows]), encoder.edit(sources, [None] * rows)
    else:
        text, null, condition = encoder.generate(PROMPTS[:rows]), encoder.generate([None] * rows), torch.zeros_like(noise)
    velocity = guided_velocity(sampler.unet, condition, text, null, torch.tensor([edit] * rows), 64, scale, image_scale)
    with torch.no_grad():
        return sample(velocity, noise, deployed_sigmas(steps, 8, 8))


@pytest.mark.parametrize("edit", [False, True], ids=["generate", "edit"])
@pytest.mark.parametrize("kind", ["base", "mobile"])
def test_own_batched_sampler_equals_the_stock_pipeline_row_by_row(checkpoints, kind, edit):
    stock = {"base": DreamLitePipeline, "mobile": DreamLiteMobilePipeline}[kind].from_pretrained(checkpoints[kind])
    stock.set_progress_bar_config(disable=True)
    sampler = Sampler.load(checkpoints[kind])
    scales = (3.5, 1.5) if kind == "base" else (1.0, 1.0)
    noise = keyed_normal((1,), [5, 6], (4, 8, 8))
    ours = own_latents(sampler, noise, edit=edit, steps=4, scale=scales[0], image_scale=scales[1])
    guidance = {"guidance_scale": 3.5, "image_guidance_scale": 1.5} if kind == "base" else {}

    def theirs(row):
        stock.prepare_latents = lambda *_, **__: noise[row : row + 1].clone()
        arguments = guidance | ({"image": SOURCES[row]} if edit else {})
        prompt = (INSTRUCTIONS if edit else PROMPTS)[row]
        return stock(prompt, height=64, width=64, num_inference_steps=4, output_type="latent", **arguments).images

    both = torch.cat([theirs(0), theirs(1)])
    assert ours.abs().amax((1, 2, 3)).min() > 0.5 and (both[0] - both[1]).abs().max() > 0.1
    torch.testing.assert_close(ours, both, atol=1e-5, rtol=1e-5)
    other = own_latents(sampler, noise, edit=edit, steps=4, scale=scales[0] + 1.0, image_scale=scales[1])
    assert ((other - both).abs().amax((1, 2, 3)) > 1e-4).all(), "another guidance scale must not pass"


def test_a_prompt_that_is_too_long_is_cut_as_the_stock_pipeline_cuts_it(checkpoints):
    stock = DreamLiteMobilePipeline.from_pretrained(checkpoints["mobile"])
    encoder = Sampler.load(checkpoints["mobile"]).encoder
    for words, kept in ((20, None), (300, GENERATE_TOKENS)):
        prompt = " ".join(["circle"] * words)
        asked = ("generate", [GENERATE_PROMPT.format(prompt)], torch.device("cpu"), torch.float32)
        theirs, mask = stock.encode_prompt(*asked, max_sequence_length=GENERATE_TOKENS)
        ours = encoder.generate([prompt, "a red circle"]).rows()
        assert kept in (None, len(ours[0])) and len(ours[0]) == mask.sum()
        torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours[1], encoder.generate(["a red circle"]).rows()[0], atol=1e-5, rtol=1e-5)


def test_sigmas_are_the_deployed_ones_at_the_released_sizes():
    expected = {1024: [1.0, 0.90453, 0.75951, 0.51284, 0.0], 512: [1.0, 0.84923, 0.65249, 0.38494, 0.0]}
    for size_px, sigmas in expected.items():
        assert deployed_sigmas(4, size_px // 8, size_px // 8) == pytest.approx(sigmas, abs=1e-5)
    other = deployed_sigmas(4, 128, 128, SCHEDULER_CONFIG | {"max_shift": 1.16})
    assert max(abs(a - b) for a, b in zip(other, expected[1024], strict=True)) > 1e-3


def test_batched_drawing_equals_one_by_one(checkpoints):
    sampler = Sampler.load(checkpoints["mobile"])
    together = sampler.generate(PROMPTS, [1, 2], steps=4, guidance_scale=1.0)
    alone = sampler.generate(PROMPTS[1:], [2], steps=4, guidance_scale=1.0)
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1


def test_hidden_state_settings_differ_by_the_final_norm(components):
    encoders = {name: PromptEncoder.load(components, name) for name in ("pre_norm", "post_norm")}
    states = {name: encoder.generate([PROMPT]).states for name, encoder in encoders.items()}
    norm = encoders["pre_norm"].text_encoder.model.language_model.norm
    torch.testing.assert_close(norm(states["pre_norm"]), states["post_norm"], atol=1e-5, rtol=1e-4)
    assert (states["pre_norm"] - states["post_norm"]).abs().max() > 0.1


def test_null_edit_prompt_still_sees_the_source(components):
    encoder = PromptEncoder.load(components, "post_norm")
    rng = np.random.default_rng(0)
    first, second = (as_image(scenes.render(scenes.sample_scene(rng))) for _ in range(2))
    nulls = encoder.edit([first, second], [None, None]).states
    assert (nulls[0] - nulls[1]).abs().max() > 1e-4
