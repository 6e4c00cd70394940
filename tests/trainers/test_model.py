"""The official network is the released one to the parameter, and only the left panel trains.
Built on the meta device: no memory, no weights."""

import torch

from tests.trainers.conftest import TINY_MODEL
from trainers.conditioning import Embeddings
from trainers.flow import predict
from trainers.model import OFFICIAL_PARAMETERS, build_unet, unet_config
from trainers.settings import ModelSettings


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
