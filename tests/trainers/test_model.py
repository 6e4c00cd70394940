"""The official network is the released one to the parameter, and only the left panel trains.
Built on the meta device: no memory, no weights."""

import torch

from tests.trainers.conftest import TINY_MODEL
from trainers.conditioning import Embeddings
from trainers.data import Batch
from trainers.flow import interpolate, predict
from trainers.model import OFFICIAL_PARAMETERS, build_unet, unet_config
from trainers.recipes.supervised import velocity_losses
from trainers.settings import ModelSettings, SupervisedSettings


def test_official_configuration_has_the_released_number_of_parameters():
    from diffusers import DreamLiteUNetModel

    with torch.device("meta"):
        official = DreamLiteUNetModel(**unet_config(ModelSettings(preset="official", size_px=1024), 2048, 128))
        defaults = DreamLiteUNetModel()
    count = sum(parameter.numel() for parameter in official.parameters())
    assert count == OFFICIAL_PARAMETERS
    assert sum(parameter.numel() for parameter in defaults.parameters()) != count, "class defaults are another network"


def test_loss_sees_the_left_panel_and_the_left_panel_sees_the_source():
    unet = build_unet(TINY_MODEL, 64, 8)
    x, condition = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    text = Embeddings(torch.randn(2, 5, 64), torch.ones(2, 5, dtype=torch.long))
    t = torch.tensor([0.3, 0.8])
    first = predict(unet, x, t, condition, text, 64)
    assert first.shape == x.shape
    other = predict(unet, x, t, condition + 1.0, text, 64)
    assert (first - other).abs().max() > 1e-3


def test_the_loss_has_no_gradient_on_the_right_half_of_the_output():
    """Exactly none; a loss over the whole width, the mistake, has one."""
    unet = build_unet(TINY_MODEL, 64, 8)
    outputs = []
    unet.conv_out.register_forward_hook(lambda module, inputs, output: (output.retain_grad(), outputs.append(output)) and None)
    batch = Batch(
        latents=torch.randn(2, 4, 8, 8), condition=torch.randn(2, 4, 8, 8), is_edit=torch.tensor([True, True]), rows=[], positions=[0, 1],
        text=Embeddings(torch.randn(2, 5, 64), torch.ones(2, 5, dtype=torch.long)), null=None, weight=torch.ones(2, 1, 8, 8),
        size_px=torch.full((2, 2), 64.0),
    )  # fmt: skip
    settings = SupervisedSettings(tasks={"edit": 1.0}, datasets=("edit",), steps=1)
    velocity_losses(unet, batch, torch.tensor([0.3, 0.8]), settings, (0,)).mean().backward()
    assert outputs[0].grad[..., 8:].abs().max() == 0.0 and outputs[0].grad[..., :8].abs().min() > 0.0
    predict_whole = unet(
        torch.cat([batch.latents, batch.condition], 3), torch.tensor([0.3, 0.8]), batch.text.states,
        encoder_attention_mask=batch.text.mask, added_cond_kwargs={"time_ids": torch.full((2, 2), 64.0)},
    ).sample  # fmt: skip
    (predict_whole**2).mean().backward()
    assert outputs[1].grad[..., 8:].abs().max() > 0.0


def test_only_the_left_half_is_noised():
    """What the network is given: x_t on the left, the clean source on the right, bit for bit."""
    given = []

    class Spy(torch.nn.Module):
        def forward(self, sample, timestep, **_):
            given.append(sample)
            return (torch.zeros_like(sample),)

    data, source, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8])
    text = Embeddings(torch.randn(2, 5, 64), torch.ones(2, 5, dtype=torch.long))
    predict(Spy(), interpolate(data, noise, t), t, source, text, 64)
    left, right = given[0].chunk(2, dim=3)
    assert torch.equal(right, source) and torch.equal(left, interpolate(data, noise, t))
    assert (interpolate(source, noise, t) - right).abs().max() > 0.1  # what a noised right half would be


def test_gradient_checkpointing_changes_no_gradient():
    x, text = torch.randn(2, 4, 8, 8), Embeddings(torch.randn(2, 5, 64), torch.ones(2, 5, dtype=torch.long))

    def gradients(checkpointing: bool, t: float = 0.5) -> list[torch.Tensor]:
        unet = build_unet(TINY_MODEL, 64, 8).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        loss = (predict(unet, x, torch.tensor([t, t]), x, text, 64) ** 2).mean()
        return list(torch.autograd.grad(loss, list(unet.parameters())))

    plain, saved, other = gradients(False), gradients(True), gradients(True, t=0.6)
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_masked_text_changes_nothing():
    unet = build_unet(TINY_MODEL, 64, 8)
    x = torch.randn(1, 4, 8, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    states = torch.randn(1, 5, 64)
    changed = states.clone()
    changed[:, 3:] += 5.0
    t = torch.tensor([0.5])
    same = predict(unet, x, t, x, Embeddings(states, mask), 64) - predict(unet, x, t, x, Embeddings(changed, mask), 64)
    assert same.abs().max() < 1e-5
    changed[:, 0] += 5.0
    seen = predict(unet, x, t, x, Embeddings(states, mask), 64) - predict(unet, x, t, x, Embeddings(changed, mask), 64)
    assert seen.abs().max() > 1e-3


def test_bfloat16_arithmetic_is_near_and_trains_every_weight_in_float32():
    unet = build_unet(TINY_MODEL, 64, 8).train()
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), Embeddings(torch.randn(2, 5, 64), torch.ones(2, 5, dtype=torch.long))
    velocities, gradients = [], []
    for precision in ("float32", "bfloat16"):
        velocities.append(predict(unet, x, t, x, text, 64, precision))
        gradients.append(torch.autograd.grad((velocities[-1] ** 2).mean(), list(unet.parameters())))
    assert {value.dtype for value in (*velocities, *gradients[1])} == {torch.float32}
    error = (velocities[0] - velocities[1]).norm() / velocities[0].norm()
    assert 0 < error < 0.05
    angle = [torch.cat([value.flatten() for value in each]) for each in gradients]
    assert torch.nn.functional.cosine_similarity(*angle, dim=0) > 0.98
