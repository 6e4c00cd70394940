"""Rewards give images a gradient that is right, finite and per image.
Wrong input (8 bits, 0..255, [-1, 1]) is refused rather than scored."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreamlite_data.rewards import load_reward
from dreamlite_data.rewards.preprocess import straight_through_clamp

FIXTURES = Path(__file__).parent / "fixtures"
BOUND = 5e-2  # the exact path rounds to 8 bits after a resize, and these random weights are steep
PROMPTS = ["a cat", "the quick brown fox", "x"]


def batch(height: int = 200, width: int = 300) -> torch.Tensor:
    pictures = [Image.open(FIXTURES / f"image{i}.png").convert("RGB").resize((width, height)) for i in range(3)]
    return torch.stack([torch.from_numpy(np.array(each)) for each in pictures]).permute(0, 3, 1, 2) / 255


def pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray((each.permute(1, 2, 0) * 255).round().byte().numpy()) for each in images]


@pytest.mark.parametrize(("size", "bound"), [((224, 224), 5e-5), ((200, 300), BOUND)])
def test_tensor_path_stays_near_the_exact_path(short_hpsv3, short_editreward, size, bound):
    images = batch(*size)
    exact = short_hpsv3.score(pil(images), PROMPTS).mu
    np.testing.assert_allclose(short_hpsv3.differentiable(images, PROMPTS).numpy(), exact, rtol=0, atol=bound)
    darker = short_hpsv3.differentiable(images * 0.8, PROMPTS).numpy()
    assert np.abs(darker - exact).max() > 2 * BOUND
    exact = short_editreward.score(pil(images), PROMPTS, pil(images.flip(0))).mu
    found = short_editreward.differentiable(images, PROMPTS, images.flip(0)).numpy()
    np.testing.assert_allclose(found, exact, rtol=0, atol=bound)


def test_every_image_gets_its_own_gradient_whatever_the_chunk(short_hpsv3):
    gradients = []
    for chunk_size in (1, 2, 3):
        images = batch().requires_grad_()
        mu = short_hpsv3.differentiable(images, PROMPTS, chunk_size=chunk_size)
        (mu * torch.tensor([1.0, 0.0, -2.0])).sum().backward()
        gradients.append(images.grad)
    assert gradients[0][0].abs().max() > 0 and gradients[0][2].abs().max() > 0
    assert gradients[0][1].abs().max() == 0  # its score was not in the loss
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-6)


def test_chunked_backward_equals_the_plain_graph(short_hpsv3, short_editreward):
    weights = torch.tensor([1.0, 0.5, -2.0])
    for model, sources in ((short_hpsv3, None), (short_editreward, batch().flip(0))):
        plain = batch().requires_grad_()
        wanted = model.heads_of_tensor(plain, PROMPTS, sources)[..., 0].mean(1)
        (wanted * weights).sum().backward()
        images = batch().requires_grad_()
        found = model.differentiable(images, PROMPTS, sources, chunk_size=2)
        (found * weights).sum().backward()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(images.grad, plain.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size", [(224, 224), (200, 300)])  # without and with a resize
def test_a_pixel_outside_the_range_gets_a_gradient(short_hpsv3, size):
    images = batch(*size)[:1]
    bright = images > 0.7
    images = torch.where(bright, images + 0.4, images).requires_grad_()
    score = short_hpsv3.differentiable(images, PROMPTS[:1])
    score.sum().backward()
    assert (images.grad[bright] != 0).float().mean() > 0.99
    clamped = short_hpsv3.differentiable(images.detach().clamp(0, 1), PROMPTS[:1])
    torch.testing.assert_close(score.detach(), clamped, rtol=0, atol=1e-4)  # forward it is clamped


def test_rounding_to_8_bits_scores_what_a_file_would_hold(short_hpsv3):
    images = batch(224, 224) * 0.777 + 0.001  # between the levels
    exact = short_hpsv3.score(pil(images), PROMPTS).mu
    rounded = short_hpsv3.differentiable(images, PROMPTS, round_to_8_bits=True)
    np.testing.assert_allclose(rounded.numpy(), exact, rtol=0, atol=5e-5)
    assert np.abs(short_hpsv3.differentiable(images, PROMPTS).numpy() - exact).max() > 5e-4
    asked = images[:1].clone().requires_grad_()
    short_hpsv3.differentiable(asked, PROMPTS[:1], round_to_8_bits=True).sum().backward()
    assert (asked.grad != 0).float().mean() > 0.99


def test_heads_stay_exact_in_a_caller_s_autocast(short_hpsv3):
    types = []
    handle = short_hpsv3.network.heads[0][0].register_forward_hook(lambda _, inputs, output: types.append((inputs[0].dtype, output.dtype)))
    try:
        with torch.autocast("cpu", torch.bfloat16):
            score = short_hpsv3.differentiable(batch()[:1], PROMPTS[:1])
    finally:
        handle.remove()
    assert types == [(torch.float32, torch.float32)] and score.dtype == torch.float32


def test_gradient_is_the_slope_of_the_score(short_hpsv3):
    images = batch(224, 224)[:1].clamp(0.1, 0.9).requires_grad_()  # no resize and no clamp: nothing straight-through
    short_hpsv3.differentiable(images, PROMPTS[:1]).sum().backward()
    direction, step = images.grad / images.grad.norm(), 0.005
    with torch.no_grad():
        up = short_hpsv3.differentiable(images + step * direction, PROMPTS[:1])
        down = short_hpsv3.differentiable(images - step * direction, PROMPTS[:1])
    assert ((up - down) / (2 * step)).item() == pytest.approx(images.grad.norm().item(), rel=0.02)


def test_edit_gradient_reaches_the_edited_image_only(short_editreward):
    edited, sources = batch().requires_grad_(), batch().flip(0).requires_grad_()
    short_editreward.differentiable(edited, PROMPTS, sources).sum().backward()
    assert (edited.grad.flatten(1).abs().amax(1) > 0).all()
    assert sources.grad is None


def test_parameters_stay_frozen(short_hpsv3):
    images = batch()[:1].requires_grad_()
    short_hpsv3.differentiable(images, PROMPTS[:1]).sum().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in short_hpsv3.network.parameters())


def test_checkpointing_recomputes_and_keeps_score_and_gradient(short_hpsv3, short_hpsv3_dir):
    plain = batch()[:1].requires_grad_()
    wanted = short_hpsv3.differentiable(plain, PROMPTS[:1])
    wanted.sum().backward()
    other = load_reward(short_hpsv3_dir)
    calls = []
    other.network.backbone.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append("decoder"))
    other.network.backbone.visual.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append("vision"))
    without = batch()[:1].requires_grad_()
    other.differentiable(without, PROMPTS[:1]).sum().backward()
    assert sorted(calls) == ["decoder", "vision"]
    calls.clear()
    other.enable_activation_checkpointing()
    images = batch()[:1].requires_grad_()
    score = other.differentiable(images, PROMPTS[:1])
    score.sum().backward()
    assert sorted(calls) == ["decoder", "decoder", "vision", "vision"]
    torch.testing.assert_close(score, wanted)
    torch.testing.assert_close(images.grad, plain.grad)


def test_clamp_passes_gradient_outside_the_range():
    values = torch.tensor([-0.2, 0.5, 1.2], requires_grad=True)
    clamped = straight_through_clamp(values)
    clamped.sum().backward()
    assert torch.equal(clamped.detach(), torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(values.grad, torch.ones(3))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda x: (x * 255).byte(), TypeError),
        (lambda x: x * 255, ValueError),
        (lambda x: x * 2 - 1, ValueError),
        (lambda x: x.permute(0, 2, 3, 1), ValueError),
        (lambda x: x * float("nan"), ValueError),
    ],
)
def test_wrong_ranges_and_layouts_are_refused(short_hpsv3, change, error):
    with pytest.raises(error, match="images01"):
        short_hpsv3.differentiable(change(batch()), PROMPTS)
