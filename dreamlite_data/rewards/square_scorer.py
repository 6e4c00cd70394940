"""What CLIP-, SigLIP- and BLIP-class scorers share: packing on CPUs, scoring in batches, gradients to images.
They stand beside the reward models behind the same calls; a subclass says only what its network makes of pixels and words."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dreamlite_data.rewards.gradient import chunked
from dreamlite_data.rewards.packing import MAX_BATCH_TOKENS, Picture, prompt_error
from dreamlite_data.rewards.preprocess import check_images01, opened_image
from dreamlite_data.rewards.scores import RewardScores
from dreamlite_data.rewards.squares import Square

PACKING_VERSION = 1
"""Raise it when ids or pixels change for the same input: it is a part of every `scorer_id`."""


@dataclasses.dataclass(frozen=True)
class PackedSquares:
    """B rows of which N could be packed. `rows` int64 [N] says which; `errors` has B entries, None where packed.
    `pixels` [N, side, side, 3] uint8 or float32, `ids` int32 and `mask` bool [N, T]; every row is `row_tokens` long."""

    rows: np.ndarray
    pixels: np.ndarray
    ids: np.ndarray
    mask: np.ndarray
    row_tokens: int
    errors: tuple[str | None, ...]

    @property
    def n_tokens(self) -> np.ndarray:
        """Tokens of each packed row, its image patches included, int64 [N]."""
        return np.full(len(self.rows), self.row_tokens, np.int64)

    def batches(self, max_tokens: int) -> list[slice]:
        """Packed rows in batches of at most `max_tokens`, but of one row at least."""
        step = max(1, max_tokens // self.row_tokens)
        return [slice(start, start + step) for start in range(0, len(self.rows), step)]


class SquarePacker:
    """Decodes, resizes and tokenizes for one scorer. Without a tokenizer the text is not looked at."""

    def __init__(self, square: Square, patch_px: int, tokenizer: Any = None, text_tokens: int = 0) -> None:
        self.square, self.tokenizer, self.text_tokens = square, tokenizer, text_tokens
        self.row_tokens = (square.side_px // patch_px) ** 2 + 1 + text_tokens

    def pack(self, images: Sequence[Picture], prompts: Sequence[str | None], sources: Sequence[Picture] | None = None) -> PackedSquares:
        """Pack every row that can be; whatever a row's image raises becomes its entry in `errors`. `sources` are not looked at:
        none of these scorers compares with the image before an edit."""
        if len(prompts) != len(images):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        errors = [None if self.tokenizer is None else prompt_error(prompt) for prompt in prompts]
        rows, pixels = [], []
        for index, picture in enumerate(images):
            if errors[index]:
                continue
            try:
                with opened_image(picture) as image:
                    pixels.append(self.square.pixels(image))
            except Exception as error:  # the contract: a bad row is a result
                errors[index] = f"{type(error).__name__}: {error}"[:500]
                continue
            rows.append(index)
        ids, mask = self.words([str(prompts[index]) for index in rows])
        side = self.square.side_px
        stacked = np.stack(pixels) if pixels else np.empty((0, side, side, 3), np.uint8)
        return PackedSquares(np.asarray(rows, np.int64), stacked, ids, mask, self.row_tokens, tuple(errors))

    def words(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, mask bool) [N, T], cut and padded to the length that the network knows; T is 0 without a tokenizer."""
        if self.tokenizer is None or not prompts:
            empty = np.empty((len(prompts), self.text_tokens))
            return empty.astype(np.int32), empty.astype(bool)
        # Special tokens in a prompt are letters: a spelt-out end token must not cut the text where its author likes.
        coded = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.text_tokens,
            split_special_tokens=True,
            return_tensors="np",
        )
        return coded["input_ids"].astype(np.int32), coded["attention_mask"].astype(bool)


class SquareScorer(abc.ABC):
    """A scorer with one number for an image and, unless it is `blind` to it, a text. It gives no log sigma (NaN)."""

    kind: ClassVar[str]
    head_names: ClassVar[tuple[str, ...]] = ("overall",)

    def __init__(self, folder: Path, packer: SquarePacker, network: nn.Module, dtype: torch.dtype) -> None:
        self.folder, self.packer, self.network, self.dtype = Path(folder), packer, network, dtype

    @abc.abstractmethod
    def mu(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores float32 [B] of normalised pixels [B, 3, side, side] in the network's dtype, ids and mask [B, T]."""

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @functools.cached_property
    def scorer_id(self) -> str:
        """Name of everything that can change a score: weights, configuration, tokenizer, preprocessing, dtype."""
        digest = hashlib.sha256(f"{self.kind} {PACKING_VERSION} {self.packer.square} {self.packer.text_tokens} {self.dtype}".encode())
        for path in sorted(
            path for path in self.folder.iterdir() if path.is_file() and not path.name.startswith(".") and path.suffix != ".md"
        ):
            with path.open("rb") as stream:
                digest.update(path.name.encode() + hashlib.file_digest(stream, "sha256").digest())
        return f"{self.kind}-{digest.hexdigest()[:12]}"

    def score(self, images: Sequence[Picture], prompts: Sequence[str], sources: Sequence[Picture] | None = None) -> RewardScores:
        """Score images against prompts. An image that cannot be read costs its own row only."""
        return self.score_packed(self.packer.pack(images, prompts, sources))

    def score_packed(self, packed: PackedSquares, batch_tokens: int = MAX_BATCH_TOKENS) -> RewardScores:
        """Score rows that a packer of this scorer prepared, in batches of `batch_tokens`."""
        heads = np.full((len(packed.errors), 1, 2), np.nan, np.float32)
        with torch.inference_mode():
            for batch in packed.batches(batch_tokens):
                pixels = self.packer.square.of_pixels(packed.pixels[batch]).to(self.device, self.dtype)
                ids, mask = (torch.from_numpy(each[batch]).to(self.device) for each in (packed.ids, packed.mask))
                heads[packed.rows[batch], 0, 0] = self.mu(pixels, ids.long(), mask).float().cpu().numpy()
        return RewardScores.of(packed, heads, slice(1))  # there is no log sigma

    def differentiable(self, images01: Tensor, prompts: Sequence[str], sources01: Tensor | None = None, chunk_size: int = 32) -> Tensor:
        """mu [B] of float images [B, 3, H, W] in [0, 1], with gradient to `images01` only; `sources01` are not looked at.
        Raises TypeError or ValueError on 8-bit or out-of-range input."""
        if len(prompts) != images01.shape[0]:
            raise ValueError(f"{images01.shape[0]} images but {len(prompts)} prompts")
        check_images01(images01)
        return chunked(self._mu_of_tensor, images01, prompts, None, chunk_size)

    def _mu_of_tensor(self, images01: Tensor, prompts: Sequence[str], sources01: Tensor | None) -> Tensor:
        ids, mask = (torch.from_numpy(each).to(self.device) for each in self.packer.words(prompts))
        pixels = self.packer.square.of_tensor(images01.to(self.device)).to(self.dtype)
        return self.mu(pixels, ids.long(), mask).float()
