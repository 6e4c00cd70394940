"""The mathematics of flow matching: conversions, signs, optima known in closed form, guidance formulas.
Every check has beside it the mistake that it would catch."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.dreamlite.pipeline_dreamlite import calculate_shift, retrieve_timesteps

from trainers import flow
from trainers.conditioning import Embeddings


def test_conversions_are_inverse_and_the_swapped_sign_is_not():
    data, noise = torch.randn(16, 4, 8, 8), torch.randn(16, 4, 8, 8)
    t = torch.rand(16)
    x = flow.interpolate(data, noise, t)
    torch.testing.assert_close(flow.data_from_velocity(x, noise - data, t), data, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(flow.noise_from_velocity(x, noise - data, t), noise, atol=1e-6, rtol=1e-5)
    velocity = torch.randn(16, 4, 8, 8)  # of no path: both estimates still put it and the point together again
    clean, eps = flow.data_from_velocity(x, velocity, t), flow.noise_from_velocity(x, velocity, t)
    torch.testing.assert_close(eps - clean, velocity, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(flow.interpolate(clean, eps, t), x, atol=1e-6, rtol=1e-5)
    assert (flow.data_from_velocity(x, data - noise, t) - data).abs().max() > 0.1


def test_an_euler_step_is_the_interpolation_of_both_estimates_and_the_score_follows():
    data, noise, t, later = torch.randn(16, 4, 8, 8), torch.randn(16, 4, 8, 8), torch.full((16,), 0.7), torch.full((16,), 0.4)
    x, velocity = flow.interpolate(data, noise, t), noise - data
    clean, eps = flow.data_from_velocity(x, velocity, t), flow.noise_from_velocity(x, velocity, t)
    stepped = flow.sample(lambda x, sigma: velocity, x, [0.7, 0.4])
    torch.testing.assert_close(stepped, flow.interpolate(clean, eps, later), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(-(x + 0.3 * velocity) / 0.7, (0.3 * clean - x) / 0.7**2, atol=2e-5, rtol=1e-5)  # two forms of the score
    assert (stepped - flow.interpolate(clean, torch.randn_like(eps), later)).abs().max() > 0.1, "a renoised step is another rule"


@pytest.mark.parametrize("sign", [1, -1])
def test_exact_velocity_carries_noise_to_the_data_distribution(sign):
    """Data N(3, 0.5^2): E[v | x_t] is known, so the sampler must land on mean 3 and deviation 0.5 (and not if flipped)."""
    mean, deviation = 3.0, 0.5

    def velocity(x, sigma):
        variance = (1 - sigma) ** 2 * deviation**2 + sigma**2
        data = mean + (1 - sigma) * deviation**2 / variance * (x - (1 - sigma) * mean)
        return sign * (x - data) / max(sigma, 1e-6)

    sigmas = [1 - step / 200 for step in range(201)]
    drawn = flow.sample(velocity, torch.randn(20_000, 1), sigmas)
    landed = abs(drawn.mean() - mean) < 0.03 and abs(drawn.std() - deviation) < 0.03
    assert landed == (sign == 1)


def test_flow_matching_minimum_for_gaussian_data_is_half_pi():
    """For data N(0, 1) and uniform t the least velocity loss is pi/2 a coordinate; the best constant reaches 2."""
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(400_000, generator=generator), torch.randn(400_000, generator=generator)
    t = torch.rand(400_000, generator=generator)
    x = flow.interpolate(data, noise, t)
    best = (2 * t - 1) / ((1 - t) ** 2 + t**2) * x
    assert ((best - (noise - data)) ** 2).mean().item() == pytest.approx(math.pi / 2, abs=0.01)
    assert ((best - (data - noise)) ** 2).mean().item() > 2.0


def test_guidance_formulas():
    null, image, full = (torch.randn(2, 4, 8, 8) for _ in range(3))
    torch.testing.assert_close(flow.guide_edit(null, image, full, 1.0, 1.0), full)
    torch.testing.assert_close(
        flow.guide_edit(null, image, full, 3.5, 1.5), null + 3.5 * (full - image) + 1.5 * (image - null)
    )
    torch.testing.assert_close(flow.guide_generate(null, full, 1.0), full)
    other_convention = full + 3.5 * (full - null)
    assert (flow.guide_generate(null, full, 3.5) - other_convention).abs().max() > 0.1


class LinearNet(torch.nn.Module):
    """A UNet whose velocity is linear in what it is told, so that each branch can be told from the others by its value."""

    calls = 0

    def forward(self, sample, timestep, encoder_hidden_states, encoder_attention_mask, added_cond_kwargs, return_dict):
        self.calls += 1
        x, panel = sample.chunk(2, dim=3)
        velocity = 0.5 * x + 2.0 * panel + encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1)
        return (torch.cat([velocity, velocity], dim=3),)


def test_guidance_of_a_mixed_batch_is_composed_of_the_deployed_branches():
    """Row 0 generates in two branches, row 1 edits in three; the other published conventions give other numbers."""
    net, x = LinearNet(), torch.randn(2, 4, 8, 8)
    source = torch.cat([torch.zeros(1, 4, 8, 8), torch.randn(1, 4, 8, 8)])
    text, null = (Embeddings(torch.full((2, 3, 8), value), torch.ones(2, 3, dtype=torch.long)) for value in (1.0, -0.25))
    is_edit = torch.tensor([False, True])

    def guided(scale, image_scale):
        net.calls = 0
        return flow.guided_velocity(net, source, text, null, is_edit, 64, scale, image_scale)(x, 0.5)

    blank, image, full = 0.5 * x - 0.25, 0.5 * x + 2.0 * source - 0.25, 0.5 * x + 2.0 * source + 1.0
    found = guided(3.5, 1.5)
    torch.testing.assert_close(found[:1], blank[:1] + 3.5 * (full - blank)[:1])
    torch.testing.assert_close(found[1:], (blank + 3.5 * (full - image) + 1.5 * (image - blank))[1:])
    assert net.calls == 3
    torch.testing.assert_close(guided(1.0, 1.0), full)
    assert net.calls == 1, "one conditional pass is all that a distilled network takes"
    guided(3.5, 1.0)
    assert net.calls == 2
    for other in (full + 3.5 * (full - image) + 1.5 * (image - blank), full + 2.5 * (full - blank)):
        assert (found - other).abs()[1].max() > 0.1


@pytest.mark.parametrize("size_px", [256, 512, 1024])
def test_student_sigmas_are_the_times_that_the_stock_pipeline_asks_its_scheduler_for(size_px):
    side, config = size_px // 8, flow.SCHEDULER_CONFIG
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    lengths = (config[name] for name in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"))
    mu = calculate_shift(side * side // 4, *lengths)
    timesteps, _ = retrieve_timesteps(scheduler, 4, "cpu", sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
    ours = flow.deployed_sigmas(4, side, side)
    assert ours[:-1] == pytest.approx((timesteps / 1000).tolist(), abs=1e-6) and ours[-1] == 0.0
    other = flow.deployed_sigmas(4, side, side, {"max_shift": 1.16})
    assert (max(abs(a - b) for a, b in zip(ours, other, strict=True)) > 1e-4) == (size_px > 256), "1.16 is the pipeline's fallback"


def test_keyed_draws_do_not_depend_on_the_batch():
    together = flow.keyed_normal((1, 2), [3, 4, 5], (4, 8, 8))
    torch.testing.assert_close(together[1:2], flow.keyed_normal((1, 2), [4], (4, 8, 8)), atol=0, rtol=0)
    assert (together[1:2] - flow.keyed_normal((1, 3), [4], (4, 8, 8))).abs().max() > 0.1


@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
def test_shift_one_changes_nothing_and_a_larger_one_favours_noise(law):
    uniform = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    plain = flow.draw_times(uniform, law, 1.0)
    assert plain.mean().item() == pytest.approx(0.5, abs=0.01)
    assert (flow.draw_times(uniform, law, 3.0) >= plain).all()
