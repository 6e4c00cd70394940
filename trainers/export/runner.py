"""Runs a DreamLite bundle with nothing but numpy, onnxruntime, tokenizers and Pillow: four UNet calls per image.
A copy travels inside every bundle; it is the reference for whoever ports the loop to a phone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

SCHEMA_VERSION = 2
MAX_BATCH = 32
"""Rows per graph call; the exported batch axis is free up to 63."""

StepCallback = Callable[[int, dict[str, np.ndarray]], None]


class Runner:
    """Text to image and instruction edits from a bundle directory.

    variant: one of the manifest's variants, which say what file each graph is read from: fp32, fp16, int8, int4.
    threads: ONNX Runtime threads per call.
    """

    def __init__(self, bundle: str | Path, variant: str = "fp32", threads: int = 1) -> None:
        self.bundle = Path(bundle)
        try:
            self.manifest = json.loads((self.bundle / "manifest.json").read_text())
        except FileNotFoundError:
            raise ValueError(f"{self.bundle} holds no manifest.json; pass the bundle directory.") from None
        if self.manifest["schema_version"] != SCHEMA_VERSION:
            raise ValueError(
                f"{self.bundle} has schema version {self.manifest['schema_version']}, this runner reads {SCHEMA_VERSION}; "
                "use the runner.py inside the bundle."
            )
        if variant not in self.manifest["variants"]:
            raise ValueError(
                f"variant '{variant}' is not in {self.bundle}; it has {', '.join(sorted(self.manifest['variants']))}."
            )
        self.variant = variant
        self.files: dict[str, str] = self.manifest["variants"][variant]["files"]
        self.threads = threads
        self.sigmas = np.asarray(self.manifest["sampler"]["sigmas"], dtype=np.float32)
        latent = self.manifest["shapes"]["latent"]
        self.latent_shape: tuple[int, int, int] = (latent["channels"], latent["height"], latent["width"])
        self.sequence_tokens: int = self.manifest["shapes"]["sequence_tokens"]
        self.tokenizer = Tokenizer.from_file(str(self.bundle / "tokenizer" / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    # --- the two things a user asks for -------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], *, hidden_states: tuple[np.ndarray, np.ndarray] | None = None
    ) -> np.ndarray:
        """Images uint8 (N, H, W, 3) for N prompts; row i depends on prompts[i] and seeds[i] alone.

        hidden_states: (states (N, S, C), mask (N, S)) from your own encoder, for bundles without a text encoder.
        """
        self._same_length(prompts=prompts, seeds=seeds)
        if not prompts:
            return self._no_images()
        hidden, mask = hidden_states if hidden_states is not None else self.encode_prompts(prompts)
        noise = self.initial_noise(seeds)
        # Generation is an edit of nothing: a zero latent, which is not the latent of a black image.
        return self.decode(self.denoise(noise, np.zeros_like(noise), hidden, mask))

    def edit(
        self,
        images: Sequence[Image.Image | np.ndarray],
        instructions: Sequence[str],
        seeds: Sequence[int],
        *,
        hidden_states: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Edited images uint8 (N, H, W, 3). `images` are PIL images or uint8 (H, W, 3) arrays of any size.

        hidden_states: (states (N, S, C), mask (N, S)) from your own encoder, for bundles without an edit encoder.
        """
        self._same_length(images=images, instructions=instructions, seeds=seeds)
        if not images:
            return self._no_images()
        pictures = [_as_picture(image) for image in images]
        hidden, mask = hidden_states if hidden_states is not None else self.encode_edits(pictures, instructions)
        condition = self.encode_images(pictures)
        return self.decode(self.denoise(self.initial_noise(seeds), condition, hidden, mask))

    # --- the loop ------------------------------------------------------------------------------------------------

    def initial_noise(self, seeds: Sequence[int]) -> np.ndarray:
        """Standard normal float32 (N, C, h, w): row i is numpy's PCG64 stream of seeds[i], drawn in C order."""
        rows = [np.random.Generator(np.random.PCG64(seed)).standard_normal(self.latent_shape, np.float32) for seed in seeds]
        return np.stack(rows)

    def denoise(
        self,
        noise: np.ndarray,
        condition: np.ndarray,
        hidden_states: np.ndarray,
        mask: np.ndarray,
        on_step: StepCallback | None = None,
    ) -> np.ndarray:
        """Latents (N, C, h, w) after all Euler steps: x += (sigma_next - sigma) * v, v the left half of the output.

        condition (N, C, h, w): latent of the source image, or zeros. on_step(i, inputs) sees each UNet call's inputs.
        """
        size = self.manifest["shapes"]["image"]
        latents = noise.astype(np.float32)
        parts = []
        for start in range(0, len(latents), MAX_BATCH):
            rows = slice(start, start + MAX_BATCH)
            x, right = latents[rows], condition[rows].astype(np.float32)
            time_ids = np.tile(np.asarray([[size["width"], size["height"]]], np.float32), (len(x), 1))
            for index, (sigma, after) in enumerate(zip(self.sigmas[:-1], self.sigmas[1:], strict=True)):
                inputs = {
                    "sample": np.concatenate([x, right], axis=3),
                    "timestep": np.full(len(x), sigma * np.float32(1000.0), np.float32),
                    "encoder_hidden_states": hidden_states[rows].astype(np.float32),
                    "encoder_attention_mask": mask[rows].astype(np.int64),
                    "time_ids": time_ids,
                }
                if on_step is not None:
                    on_step(index, inputs)
                velocity = self.run_graph("unet", inputs)[..., : x.shape[3]]
                x = x + (after - sigma) * velocity
            parts.append(x)
        return np.concatenate(parts)

    # --- text, images, latents -----------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Hidden states float32 (N, S, C) and mask int64 (N, S) of generate prompts; too long a prompt is cut."""
        self._require("text_encoder")
        text = self.manifest["prompts"]
        drop, room = text["generate_drop_tokens"], text["generate_drop_tokens"] + self.sequence_tokens
        rows = []
        for prompt in prompts:
            ids = self.tokenizer.encode(text["generate_template"].format(text["generate_prompt"].format(prompt))).ids
            if len(ids) > room:
                warnings.warn(f"prompt cut from {len(ids) - drop} to {self.sequence_tokens} tokens: {prompt[:60]!r}", stacklevel=2)
            rows.append(ids[:room])
        return self._encode("text_encoder", rows, drop, room, {})

    def encode_edits(
        self, images: Sequence[Image.Image | np.ndarray], instructions: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Hidden states float32 (N, S, C) and mask int64 (N, S) of source images with their instructions."""
        self._require("edit_encoder")
        text, vision = self.manifest["prompts"], self.manifest["vision"]
        drop, room = text["edit_drop_tokens"], text["edit_drop_tokens"] + self.sequence_tokens
        template = text["edit_template"].replace(text["image_token"], text["image_token"] * vision["tokens"])
        rows = []
        for instruction in instructions:
            ids = self.tokenizer.encode(template.format(text["edit_prompt"].format(instruction))).ids
            if len(ids) > room:
                raise ValueError(
                    f"instruction needs {len(ids) - drop} tokens, this bundle holds {self.sequence_tokens}: "
                    f"{instruction[:60]!r}; shorten it or export with a larger sequence_tokens."
                )
            rows.append(ids)
        pixels = np.stack([self._vision_pixels(_as_picture(image)) for image in images])
        return self._encode("edit_encoder", rows, drop, room, {"pixels": pixels})

    def encode_images(self, images: Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        """Latents (N, C, h, w) of images, squeezed to the bundle's size with Lanczos as the stock pipeline does."""
        size = self.manifest["shapes"]["image"]
        wanted = (size["width"], size["height"])
        pixels = [np.asarray(_resized(_as_picture(image), wanted, Image.Resampling.LANCZOS), np.float32) for image in images]
        batch = np.stack(pixels).transpose(0, 3, 1, 2) / np.float32(255.0) * 2 - 1
        return self._chunked("vae_encoder", {"image": batch})

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images uint8 (N, H, W, 3) of latents (N, C, h, w)."""
        return to_pixels(self._chunked("vae_decoder", {"latent": latents.astype(np.float32)}))

    # --- plumbing ------------------------------------------------------------------------------------------------

    def _require(self, encoder: str) -> None:
        if encoder not in self.files:
            raise ValueError(
                f"{self.bundle} carries no {encoder.replace('_', ' ')} ({self.manifest['encoder']['name']} stays external); "
                "pass hidden_states=(states, mask) computed with that encoder."
            )

    def _encode(
        self, graph: str, rows: list[list[int]], drop: int, room: int, extra: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full((len(rows), room), self.manifest["encoder"]["pad_token_id"], np.int64)
        mask = np.zeros((len(rows), room), np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        states = self._chunked(graph, extra | {"input_ids": ids, "attention_mask": mask})
        # The template's first tokens are the same for every prompt; the UNet was trained without them.
        states, mask = states[:, drop:], mask[:, drop:]
        return states * mask[..., None].astype(np.float32), mask

    def _vision_pixels(self, picture: Image.Image) -> np.ndarray:
        """Source image as the vision tower wants it: float32 (3, rows, columns) in [0, 1]."""
        vision = self.manifest["vision"]
        picture = _resized(picture, (vision["resize_px"], vision["resize_px"]), Image.Resampling.LANCZOS)
        rows, columns = vision["grid_px"]
        picture = _resized(picture, (columns, rows), Image.Resampling.BICUBIC)
        return np.asarray(picture, np.float32).transpose(2, 0, 1) / np.float32(255.0)

    def _session(self, graph: str) -> onnxruntime.InferenceSession:
        if graph not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            options.log_severity_level = 3
            for key, value in self.manifest["variants"][self.variant]["session_options"].items():
                options.add_session_config_entry(key, value)
            path = self.bundle / self.files[graph]
            if not path.is_file():
                raise ValueError(f"{path} is missing; copy the whole bundle directory.")
            self._sessions[graph] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return self._sessions[graph]

    def run_graph(self, graph: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Output of one graph ('unet', 'vae_decoder', ...) for the inputs that the manifest lists, as one batch."""
        return self._session(graph).run(None, inputs)[0]

    def _chunked(self, graph: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        total = len(next(iter(inputs.values())))
        chunks = [slice(start, start + MAX_BATCH) for start in range(0, total, MAX_BATCH)]
        return np.concatenate([self.run_graph(graph, {key: value[rows] for key, value in inputs.items()}) for rows in chunks])

    def _no_images(self) -> np.ndarray:
        size = self.manifest["shapes"]["image"]
        return np.zeros((0, size["height"], size["width"], 3), np.uint8)

    @staticmethod
    def _same_length(**lists: Sequence[object]) -> None:
        if len({len(items) for items in lists.values()}) > 1:
            counts = ", ".join(f"{len(items)} {name}" for name, items in lists.items())
            raise ValueError(f"one of each is needed per row, got {counts}.")


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Decoder output (N, 3, H, W), about in [-1, 1], as uint8 (N, H, W, 3)."""
    return (np.clip(images / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)


def _as_picture(image: Image.Image | np.ndarray) -> Image.Image:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image, np.uint8))
    return picture.convert("RGB")


def _resized(picture: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, resample)
