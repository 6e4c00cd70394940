"""The text encoder is trained on what the pipelines feed it, and says what it sees."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from dreamlite_data import scenes
from trainers.components.build import PACKAGED
from trainers.components.classes import CELLS, scene_labels
from trainers.components.text_encoder import CellHead, SceneProbe, patchify, probe_loss, sample_prompts
from trainers.components.tokenizer import build_tokenizer
from trainers.conditioning import PromptEncoder, encoder_image


def test_training_patches_are_those_of_the_processor() -> None:
    rng = np.random.default_rng(0)
    images = [scenes.render(scenes.sample_scene(rng)) for _ in range(6)]
    encoder = PromptEncoder.load(PACKAGED, "post_norm")
    real = encoder.processor.image_processor([encoder_image(Image.fromarray(image)) for image in images], return_tensors="pt")
    patches, grids = patchify(np.stack(images))
    assert torch.equal(grids, real["image_grid_thw"])
    difference = (patches - real["pixel_values"]).abs()
    assert difference.mean() < 0.01  # two resizings against one
    shuffled = patches.view(6, -1, patches.shape[1]).roll(1, 1).flatten(0, 1)
    assert (shuffled - real["pixel_values"]).abs().mean() > 5 * difference.mean()  # the order of patches is part of it


def test_edit_prompts_ask_for_the_target_and_carry_the_source() -> None:
    prompts = sample_prompts("edit", 8, np.random.default_rng(1), build_tokenizer())
    assert (prompts.inputs["mm_token_type_ids"].sum(1) == CELLS).all()
    assert all(want.key() != source.key() for want, source in zip(prompts.wanted, prompts.sources, strict=True))
    assert sample_prompts("generate", 2, np.random.default_rng(1), build_tokenizer()).sources == []


def test_probe_loss_is_least_for_the_truth() -> None:
    batch = [scenes.sample_scene(np.random.default_rng(index)) for index in range(4)]
    labels = scene_labels(batch)
    sizes = {name: head.out_features for name, head in SceneProbe(16).heads.items()}
    sure = {name: 9.0 * torch.nn.functional.one_hot(labels[name], sizes[name]).float() for name in labels}
    wrong = {name: value.roll(1, -1) for name, value in sure.items()}
    assert probe_loss(sure, labels) < 0.1 < 5 < probe_loss(wrong, labels)
    head = CellHead(16)
    assert head(torch.zeros(4, CELLS, 16)).shape == (4, CELLS, sum(sizes.values()))
    assert torch.isfinite(head.loss(torch.randn(4 * CELLS, 16), batch))
