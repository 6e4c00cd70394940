"""Measures how far a bundle's graphs are from torch: each graph alone, then the whole loop from noise to image.
The torch side is built from the stock classes and the training code's own conditioning, so agreement means something."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderTiny, DreamLiteUNetModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from trainers.conditioning import Embeddings, PromptEncoder
from trainers.export.rows import Row
from trainers.export.source import Source


def difference(reference: np.ndarray, value: np.ndarray) -> dict[str, float]:
    """max_abs and PSNR in dB over the reference's range: 20 log10((max - min) / rmse), 200 where equal."""
    reference, value = reference.astype(np.float64), value.astype(np.float64)
    rmse = float(np.sqrt(np.mean((reference - value) ** 2)))
    span = float(reference.max() - reference.min())
    psnr = 200.0 if rmse == 0 else 20 * np.log10(max(span, 1e-12) / rmse)
    return {"max_abs": float(np.abs(reference - value).max()), "psnr_db": round(float(min(psnr, 200.0)), 2)}


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
    def denoise(self, noise: np.ndarray, condition: np.ndarray, embeddings: Embeddings) -> np.ndarray:
        """Latents (N, C, h, w) after all Euler steps from given noise and condition latents."""
        latents, right = torch.from_numpy(noise), torch.from_numpy(condition)
        time_ids = torch.full((len(latents), 2), float(self.source.size_px))
        for sigma, after in zip(self.sigmas[:-1], self.sigmas[1:], strict=True):
            velocity = self.unet(
                torch.cat([latents, right], dim=3),
                (sigma * 1000).expand(len(latents)),
                embeddings.states,
                encoder_attention_mask=embeddings.mask,
                added_cond_kwargs={"time_ids": time_ids},
                return_dict=False,
            )[0][..., : latents.shape[3]]
            latents = latents + (after - sigma) * velocity
        return latents.numpy()

    @torch.no_grad()
    def velocity(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """One UNet call with the exported graph's five inputs: (N, 4, h, 2w)."""
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        time_ids = tensors.pop("time_ids")
        return self.unet(**tensors, added_cond_kwargs={"time_ids": time_ids}, return_dict=False)[0].numpy()

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


def kept(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The unmasked rows of (N, S, C) as (tokens, C): padded lengths may differ between two encoders."""
    return states[mask.astype(bool)]

