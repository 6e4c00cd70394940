"""The mathematics of flow matching: conversions, signs, optima known in closed form, guidance formulas.
Every check has beside it the mistake that it would catch."""

import math

import pytest
import torch

from trainers import flow


def test_conversions_are_inverse_and_the_swapped_sign_is_not():
    data, noise = torch.randn(16, 4, 8, 8), torch.randn(16, 4, 8, 8)
    t = torch.rand(16)
    x = flow.interpolate(data, noise, t)
    torch.testing.assert_close(flow.data_from_velocity(x, noise - data, t), data, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(flow.noise_from_velocity(x, noise - data, t), noise, atol=1e-6, rtol=1e-5)
    assert (flow.data_from_velocity(x, data - noise, t) - data).abs().max() > 0.1


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
