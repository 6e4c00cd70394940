"""Two loops over the same model, rows and batch: ours, and that of diffusers' examples/text_to_image/train_text_to_image.py.
As a program it prints the peak memory that a few steps of one of them add to the loaded model, in bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dreamlite_data import scenes
from tests.trainers.synthetic import SceneRows
from trainers import parallel
from trainers.components.build import PACKAGED
from trainers.conditioning import PromptEncoder
from trainers.export.rerun import memory_mb, reset_peak
from trainers.flow import predict
from trainers.model import build_unet, load_vae
from trainers.pixels import to_tensor
from trainers.recipes.supervised import SupervisedRecipe
from trainers.settings import ModelSettings, SupervisedSettings

BATCH, MICRO_BATCH, ROWS, SIDE, SIZE_PX, TEXT_WIDTH = 32, 8, 64, 8, 64, 128
T2I = SupervisedSettings(tasks={"generate": 1.0}, datasets=("t2i",), steps=100, batch=BATCH, micro_batch=MICRO_BATCH)


def ours() -> Callable[[], object]:
    """A step of our recipe: cached latents and prompt states, micro-batches on threads."""
    rows = SceneRows(ROWS, load_vae(PACKAGED), PromptEncoder.load(PACKAGED, "post_norm"))
    recipe = SupervisedRecipe(build_unet(ModelSettings(), TEXT_WIDTH, SIDE), rows, T2I, (0,))
    numbers = iter(range(10_000))
    return lambda: recipe.step(next(numbers))


def of_diffusers() -> Callable[[], object]:
    """A step of the example: images and captions from a DataLoader, VAE and text encoder in the loop, accelerate around it,
    `--use_ema`, AdamW, clipping at 1. Its noise schedule is replaced by ours, for the model predicts a velocity."""
    vae, encoder = load_vae(PACKAGED), PromptEncoder.load(PACKAGED, "post_norm")
    unet = build_unet(ModelSettings(), TEXT_WIDTH, SIDE).train()
    rng = np.random.default_rng(0)
    drawn = [scenes.sample_scene(rng) for _ in range(ROWS)]
    rows = [(to_tensor(scenes.render(scene)[None])[0], scenes.caption(scene, rng)) for scene in drawn]
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=1)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=T2I.learning_rate, weight_decay=T2I.weight_decay)
    schedule = get_scheduler("constant", optimizer=optimizer)
    loader = DataLoader(
        rows, shuffle=True, batch_size=BATCH, drop_last=True,
        collate_fn=lambda part: {"pixel_values": torch.stack([pixels for pixels, _ in part]), "captions": [text for _, text in part]},
    )  # fmt: skip
    unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)
    average = EMAModel(unet.parameters(), model_cls=type(unet), model_config=unet.config)

    def batches() -> Iterator[dict]:
        while True:
            yield from loader

    stream = batches()

    def step() -> float:
        batch = next(stream)
        with accelerator.accumulate(unet):
            with torch.no_grad():
                latents = vae.encode(batch["pixel_values"]).latents
            noise = torch.randn_like(latents)
            t = torch.rand(len(latents)).view(-1, 1, 1, 1)
            text = encoder.generate(batch["captions"])
            velocity = predict(unet, (1 - t) * latents + t * noise, t.flatten(), torch.zeros_like(latents), text, SIZE_PX)
            loss = F.mse_loss(velocity.float(), (noise - latents).float(), reduction="mean")
            shown = accelerator.gather(loss.repeat(BATCH)).mean().item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            average.step(unet.parameters())
        return shown

    return step


def main(name: str) -> None:
    """Memory of the process grows to its peak within the first steps; what the loaded model takes is not counted."""
    step = {"ours": ours, "diffusers": of_diffusers}[name]()
    parallel.use_threads(2 if name == "ours" else 1)
    if not reset_peak():  # loading may have set it
        raise OSError("this system cannot start a process's memory peak anew, which only Linux can")
    before = memory_mb("VmRSS")
    for _ in range(3):
        step()
    print(round((memory_mb("VmHWM") - before) * 2**20))


if __name__ == "__main__":
    main(sys.argv[1])
