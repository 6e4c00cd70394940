"""Images from a checkpoint: the batched sampler for both tasks, with one seed a row.
The stock pipelines take one prompt at a time; this one gives the same latents for a whole batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DreamLiteUNetModel
from PIL import Image

from trainers.conditioning import Embeddings, PromptEncoder, stack
from trainers.data import square
from trainers.device import CPU
from trainers.flow import deployed_sigmas, guided_velocity, keyed_normal, sample
from trainers.model import latent_scale, load_facts, load_unet, load_vae
from trainers.parallel import map_threads
from trainers.pixels import to_tensor, to_uint8

NOISE_KEY = (0x6E, 0x6F)
BATCH = 16


@dataclasses.dataclass
class Sampler:
    """A checkpoint ready to draw. A distilled one takes its own few steps and no guidance, whatever is asked."""

    unet: DreamLiteUNetModel
    vae: AutoencoderTiny
    encoder: PromptEncoder
    size_px: int
    distilled_steps: int | None

    @classmethod
    def load(cls, checkpoint: Path, device: torch.device = CPU) -> Sampler:
        """Load a checkpoint folder onto a device; its recorded hidden-state setting decides what the encoder hands over."""
        facts = load_facts(checkpoint)
        return cls(
            unet=load_unet(checkpoint).eval().to(device),
            vae=load_vae(checkpoint).to(device),
            encoder=PromptEncoder.load(checkpoint, facts["hidden_state"]).to(device),
            size_px=facts["size_px"],
            distilled_steps=facts["distilled_steps"],
        )

    @property
    def device(self) -> torch.device:
        """Where it draws."""
        return self.unet.device

    @property
    def side(self) -> int:
        """Width of a panel in latents."""
        return self.size_px // latent_scale(self.vae.config)

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance_scale: float, batch: int = BATCH
    ) -> np.ndarray:
        """Text to image: uint8 [N, H, W, 3]; row i depends on its prompt and seed alone."""
        # A distilled network takes no guidance, so its null states would be encoded for nothing.
        null_row = [] if self.distilled_steps else self.encoder.generate([None]).rows()

        def draw(start: int) -> np.ndarray:
            part = list(prompts[start : start + batch])
            text = self.encoder.generate(part)
            condition = torch.zeros(len(part), 4, self.side, self.side, device=self.device)
            noise = self._noise(seeds[start : start + batch])
            null = text if self.distilled_steps else stack(null_row * len(part))
            return self._draw(noise, condition, text, null, False, steps, guidance_scale, 1.0)

        return np.concatenate(list(map_threads(draw, range(0, len(prompts), batch))))

    def edit(
        self,
        images: Sequence[Image.Image],
        instructions: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance_scale: float,
        image_guidance_scale: float,
        batch: int = BATCH,
    ) -> np.ndarray:
        """Edit by instruction: uint8 [N, H, W, 3]; sources are cropped to a square of the checkpoint's size."""

        def draw(start: int) -> np.ndarray:
            sources = [square(image, self.size_px) for image in images[start : start + batch]]
            texts = list(instructions[start : start + batch])
            text = self.encoder.edit(sources, list(texts))
            null = text if self.distilled_steps else self.encoder.edit(sources, [None] * len(sources))
            condition = self.encode_images(sources)
            noise = self._noise(seeds[start : start + batch])
            return self._draw(noise, condition, text, null, True, steps, guidance_scale, image_guidance_scale)

        return np.concatenate(list(map_threads(draw, range(0, len(images), batch))))

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Latents [N, 4, side, side] of RGB squares."""
        return self.vae.encoder(to_tensor(np.stack([np.asarray(image) for image in images]), self.device))

    @torch.no_grad()
    def round_trip(self, images: Sequence[Image.Image], batch: int = BATCH) -> np.ndarray:
        """The images as the VAE gives them back, uint8 [N, H, W, 3]: the best that a network on its latents can draw."""
        squares = [square(image, self.size_px) for image in images]
        parts = map_threads(lambda start: self._decode(self.encode_images(squares[start : start + batch])), range(0, len(squares), batch))
        return np.concatenate(list(parts))

    def _noise(self, seeds: Sequence[int]) -> torch.Tensor:
        return keyed_normal(NOISE_KEY, list(seeds), (4, self.side, self.side), self.device)

    @torch.no_grad()
    def _draw(
        self,
        noise: torch.Tensor,
        condition: torch.Tensor,
        text: Embeddings,
        null: Embeddings,
        edit: bool,
        steps: int,
        scale: float,
        image_scale: float,
    ) -> np.ndarray:
        if self.distilled_steps:
            steps, scale, image_scale = self.distilled_steps, 1.0, 1.0
        is_edit = torch.full((len(noise),), edit, device=self.device)
        velocity = guided_velocity(self.unet, condition, text, null, is_edit, self.size_px, scale, image_scale)
        return self._decode(sample(velocity, noise, deployed_sigmas(steps, self.side, self.side)))

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor) -> np.ndarray:
        return to_uint8(self.vae.decoder(latents))


def generate_images(
    checkpoint: Path,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 10,
    guidance_scale: float = 2.0,
    device: torch.device = CPU,
) -> list[Image.Image]:
    """Draw one image a prompt."""
    drawn = Sampler.load(checkpoint, device).generate(
        prompts, range(seed, seed + len(prompts)), steps=steps, guidance_scale=guidance_scale
    )
    return [Image.fromarray(image) for image in drawn]


def edit_images(
    checkpoint: Path,
    images: Sequence[Image.Image],
    instructions: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 10,
    guidance_scale: float = 2.0,
    image_guidance_scale: float = 1.0,
    device: torch.device = CPU,
) -> list[Image.Image]:
    """Edit each image by its instruction."""
    edited = Sampler.load(checkpoint, device).edit(
        images,
        instructions,
        range(seed, seed + len(images)),
        steps=steps,
        guidance_scale=guidance_scale,
        image_guidance_scale=image_guidance_scale,
    )
    return [Image.fromarray(image) for image in np.asarray(edited)]
