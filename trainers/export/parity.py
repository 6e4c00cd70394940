"""The torch side of every comparison: the checkpoint in float32, as trained, from noise to image.
Built from the stock classes and the training code's own conditioning, so agreement means something."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import AutoencoderTiny, DreamLiteUNetModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from trainers.conditioning import Embeddings, PromptEncoder
from trainers.export.rows import Row
from trainers.export.source import Source


class TorchReference:
    """The checkpoint in torch fp32, as trained: stock attention processors, stock VAE, the encoder of training."""

    def __init__(self, source: Source, steps: int) -> None:
        folder = source.directory
        self.source = source
        self.unet = DreamLiteUNetModel.from_pretrained(folder / "unet").eval().float()
        self.vae = AutoencoderTiny.from_pretrained(folder / "vae").eval().float()
        self.image_processor = VaeImageProcessor(vae_scale_factor=2 * source.scale)
        self.encoder = PromptEncoder.load(folder, source.hidden_state)
        self.sigmas = torch.tensor(source.sigmas(steps), dtype=torch.float32)

    @torch.no_grad()
    def denoise(
        self, noise: np.ndarray, condition: np.ndarray, embeddings: Embeddings, on_call: Callable[[dict[str, np.ndarray]], None] | None = None
    ) -> np.ndarray:
        """Latents (N, C, h, w) after all Euler steps from given noise and condition latents.

        on_call sees each UNet call: sample (N, C, h, 2w), timestep (N,) and the velocity (N, C, h, 2w) of both panels.
        """
        latents, right = torch.from_numpy(noise), torch.from_numpy(condition)
        time_ids = torch.full((len(latents), 2), float(self.source.size_px))
        for sigma, after in zip(self.sigmas[:-1], self.sigmas[1:], strict=True):
            sample, timestep = torch.cat([latents, right], dim=3), (sigma * 1000).expand(len(latents))
            velocity = self.unet(
                sample,
                timestep,
                embeddings.states,
                encoder_attention_mask=embeddings.mask,
                added_cond_kwargs={"time_ids": time_ids},
                return_dict=False,
            )[0]
            if on_call is not None:
                on_call({"sample": sample.numpy(), "timestep": timestep.numpy(), "velocity": velocity.numpy()})
            latents = latents + (after - sigma) * velocity[..., : latents.shape[3]]
        return latents.numpy()

    @torch.no_grad()
    def encode_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Latents (N, 4, h, w) of uint8 (H, W, 3) images, squeezed to the trained size as the stock pipeline does."""
        size = self.source.size_px
        processed = [self.image_processor.preprocess(Image.fromarray(image), height=size, width=size) for image in images]
        return self.vae.encode(torch.cat(processed)).latents.numpy()

    @torch.no_grad()
    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images (N, 3, H, W) of latents, not clamped."""
        shift = getattr(self.vae.config, "shift_factor", 0.0) or 0.0
        return self.vae.decode(torch.from_numpy(latents) / self.vae.config.scaling_factor + shift).sample.numpy()

    def embed(self, rows: Sequence[Row]) -> Embeddings:
        """Hidden states and mask of rows of one task, right padded to the longest row."""
        texts = [row.text for row in rows]
        if rows[0].task == "generate":
            return self.encoder.generate(texts)
        return self.encoder.edit([Image.fromarray(row.image) for row in rows], texts)
