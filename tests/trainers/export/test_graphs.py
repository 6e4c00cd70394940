"""Sigmas and the two encoder graphs equal their stock counterparts before any ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from trainers.conditioning import PromptEncoder
from trainers.export.runner import Runner
from trainers.export.schedule import deployed_sigmas
from trainers.export.source import read_source
from trainers.export.text_graphs import EditEncoderGraph, EditLayout, TextEncoderGraph

KNOWN = {  # facts of the released scheduler, measured: (side px, max_shift) -> four sigmas
    (1024, 1.15): [1.0, 0.90453, 0.75951, 0.51284, 0.0],
    (1024, 1.16): [1.0, 0.90539, 0.76133, 0.51534, 0.0],
    (512, 1.15): [1.0, 0.84923, 0.65249, 0.38494, 0.0],
}


@pytest.mark.parametrize(("side_px", "max_shift"), KNOWN)
def test_sigmas_are_the_deployed_ones(side_px: int, max_shift: float) -> None:
    config = {"base_shift": 0.5, "max_shift": max_shift, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    assert np.allclose(deployed_sigmas(config, (side_px // 8) ** 2 // 4, 4), KNOWN[side_px, max_shift], atol=1e-5)


def test_sigmas_equal_the_scheduler(checkpoint: Path) -> None:
    from diffusers.pipelines.dreamlite.pipeline_dreamlite_mobile import calculate_shift

    source = read_source(checkpoint)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(checkpoint / "scheduler")
    config = scheduler.config
    shift = calculate_shift(16, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.25, 4), mu=shift)
    assert np.allclose(scheduler.sigmas.numpy(), source.sigmas(4), atol=1e-6)


@pytest.mark.parametrize("hidden_state", ["post_norm", "pre_norm"])
def test_encoder_graphs_equal_training_conditioning(checkpoint: Path, hidden_state: str) -> None:
    """Both recorded settings give what training used; the other setting does not."""
    encoder = PromptEncoder.load(checkpoint, hidden_state)
    source = read_source(checkpoint)
    prompts, vision = source.prompts(), source.vision
    texts = ["a red circle on a white background", "blue"]
    want = encoder.generate(texts)
    rows = [prompts["generate_template"].format(prompts["generate_prompt"].format(text)) for text in texts]
    tokens = encoder.tokenizer(rows, padding=True, return_tensors="pt")
    other = "pre_norm" if hidden_state == "post_norm" else "post_norm"
    for setting, equal in ((hidden_state, True), (other, False)):
        with torch.no_grad():
            states = TextEncoderGraph(encoder.text_encoder, setting)(tokens["input_ids"], tokens["attention_mask"])
        got = states[:, source.drop_generate :][want.mask.bool()]
        assert ((got - want.states[want.mask.bool()]).abs().max() < 1e-5) == equal

    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)) for i in range(2)]
    want = encoder.edit(images, texts)
    template = prompts["edit_template"].replace("<|image_pad|>", "<|image_pad|>" * vision.tokens)
    rows = [template.format(prompts["edit_prompt"].format(text)) for text in texts]
    tokens = encoder.tokenizer(rows, padding=True, return_tensors="pt")
    start = int((tokens["input_ids"][0] == encoder.text_encoder.config.image_token_id).nonzero()[0])
    graph = EditEncoderGraph(
        encoder.text_encoder,
        hidden_state,
        EditLayout(start, vision.tokens, vision.grid),
        tokens["input_ids"][:1],
        list(vision.mean),
        list(vision.std),
    )
    runner = Runner.__new__(Runner)
    runner.manifest = {"vision": {"resize_px": vision.resize_px, "grid_px": list(vision.grid_px)}}
    pixels = torch.from_numpy(np.stack([runner._vision_pixels(image) for image in images]))
    with torch.no_grad():
        states = graph(pixels, tokens["input_ids"], tokens["attention_mask"])
        blind = graph(pixels.flip(0), tokens["input_ids"], tokens["attention_mask"])
    keep = want.mask.bool()
    assert (states[:, source.drop_edit :][keep] - want.states[keep]).abs().max() < 1e-4
    assert (blind[:, source.drop_edit :][keep] - want.states[keep]).abs().max() > 1e-3
