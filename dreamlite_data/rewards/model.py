"""The reward model that operators and recipes use: scores in batches, gradients to images in chunks.
One class for HPSv3 and EditReward; what differs between them is in the spec."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dreamlite_data.rewards.network import PackedText, RewardNetwork, load_network
from dreamlite_data.rewards.preprocess import (
    check_images01,
    normalise_pixels,
    normalised_from_tensor,
    patchify,
    pixels_from_file,
    pixels_from_pil,
)
from dreamlite_data.rewards.spec import RewardSpec, read_spec
from dreamlite_data.rewards.stored import RewardCheckpointError, weight_files
from dreamlite_data.rewards.text import RewardTokenizer, split_common

MAX_BATCH_TOKENS = 32_768
"""Decoder tokens of one scoring batch: 40 rows of HPSv3, hundreds of small-world rows."""


@dataclasses.dataclass(frozen=True)
class RewardScores:
    """Scores of B rows. `heads` [B, H, 2] holds (mu, log sigma) of each head, `mu` and `log_sigma` their means over
    heads. Index 1 is a log standard deviation, never a quality. A row that could not be scored has NaN and a reason
    in `errors`, which is None elsewhere. `tokens` int64 [B] counts what ran through the decoder, 0 for such a row."""

    mu: np.ndarray
    log_sigma: np.ndarray
    heads: np.ndarray
    errors: tuple[str | None, ...]
    tokens: np.ndarray


@dataclasses.dataclass
class _Row:
    index: int
    images: list[np.ndarray]
    trunk: list[int]
    branches: list[list[int]]

    @property
    def length(self) -> int:
        return len(self.trunk) + sum(map(len, self.branches))


class RewardModel:
    """A loaded reward model. Scores have no fixed range: compare them within one `scorer_id`, filter by quantile."""

    def __init__(
        self, model_dir: Path, network: RewardNetwork, spec: RewardSpec, *, share_prefix: bool = True
    ) -> None:
        if len(network.heads) != len(spec.heads):
            raise RewardCheckpointError(
                f"{model_dir} holds {len(network.heads)} reward heads, but its kind {spec.kind!r} has {len(spec.heads)} "
                f"({', '.join(spec.heads)}); set kind, heads and prompts in reward_spec.json to those it was trained with"
            )
        self.model_dir, self.network, self.spec = Path(model_dir), network, spec
        self.share_prefix = share_prefix
        vision = network.config.vision_config
        self.patch, self.merge, self.temporal = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        rows = network.backbone.get_input_embeddings().weight.shape[0]
        self.tokenizer = RewardTokenizer(self.model_dir, spec, rows)
        # Ids come from the tokenizer; a config may still name the base model's.
        network.config.image_token_id = self.tokenizer.image_id

    @property
    def kind(self) -> str:
        """'hpsv3' or 'editreward'."""
        return self.spec.kind

    @property
    def head_names(self) -> tuple[str, ...]:
        """What each head judges: ('overall',) or ('follow', 'quality')."""
        return self.spec.heads

    @functools.cached_property
    def scorer_id(self) -> str:
        """Name of everything that can change a score: weights, spec with prompts, tokenizer, preprocessing, dtype."""
        digest = hashlib.sha256(self.spec.digest().encode())
        names = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.json")
        extra = [path for name in names if (path := self.model_dir / name).exists()]
        for path in [*weight_files(self.model_dir), *extra]:
            with path.open("rb") as opened:
                digest.update(path.name.encode() + hashlib.file_digest(opened, "sha256").digest())
        digest.update(str(self.network.backbone.dtype).encode() + (b" nf4" if self.network.four_bit else b""))
        return f"{self.kind}-{digest.hexdigest()[:12]}"

    def score(
        self,
        images: Sequence[Image.Image | Path],
        prompts: Sequence[str],
        sources: Sequence[Image.Image | Path] | None = None,
        batch_size: int = 64,
    ) -> RewardScores:
        """Score images against prompts; `sources` are the images before the edit (EditReward needs them, HPSv3 refuses
        them). Rows are sorted by length and batched to at most `batch_size` rows; batching does not change a score.
        An image given as a file is opened, resized and closed in its turn. An image or a prompt that cannot be read
        costs its own row only."""
        self._check_rows(len(images), prompts, sources)
        rows: list[_Row] = []
        errors = [_prompt_error(prompt) for prompt in prompts]
        branches = self.tokenizer.branches([prompt if error is None else "" for prompt, error in zip(prompts, errors, strict=True)])
        for index, image in enumerate(images):
            if errors[index]:
                continue
            group = [image] if sources is None else [sources[index], image]
            try:
                pixels = [self._pixels(each) for each in group]
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                errors[index] = f"{type(error).__name__}: {error}"
                continue
            trunk = self.tokenizer.trunk([self._image_tokens(each.shape[:2]) for each in pixels])
            row = _Row(index, pixels, *self._shared(trunk, branches[index]))
            if row.length > MAX_BATCH_TOKENS:
                errors[index] = f"ValueError: the prompt makes {row.length:,} tokens, more than {MAX_BATCH_TOKENS:,}"
                continue
            rows.append(row)
        heads = np.full((len(images), len(self.spec.heads), 2), np.nan, np.float32)
        with torch.inference_mode():
            for chosen in batches([row.length for row in rows], batch_size):
                batch = [rows[number] for number in chosen]
                heads[[row.index for row in batch]] = self._score_batch(batch).cpu().numpy()
        for index in np.flatnonzero(~np.isfinite(heads).all((1, 2))):
            errors[index] = errors[index] or "the model returned a value that is not finite"
            heads[index] = np.nan
        mean = heads.mean(1)
        tokens = np.zeros(len(images), np.int64)
        tokens[[row.index for row in rows]] = [row.length for row in rows]
        tokens[np.isnan(mean[:, 0])] = 0
        return RewardScores(mean[:, 0].copy(), mean[:, 1].copy(), heads, tuple(errors), tokens)

    def differentiable(
        self,
        images01: Tensor,
        prompts: Sequence[str],
        sources01: Tensor | None = None,
        chunk_size: int = 32,
        round_to_8_bits: bool = False,
    ) -> Tensor:
        """mu [B] of float images [B, 3, H, W] in [0, 1], with gradient to `images01` only.

        The graph of one chunk lives at a time: each score depends on its own image alone, so its gradient is taken at
        once and kept as an image. `round_to_8_bits` scores what a stored file would hold, with the gradient passed
        straight through. Without a resize and with rounding this is `score` to float error; the resize differs from
        PIL's by up to one 8-bit level a pixel. Raises TypeError or ValueError on 8-bit or out-of-range input.
        """
        self._check_rows(images01.shape[0], prompts, sources01)
        check_images01(images01)
        if sources01 is not None:
            check_images01(sources01, "sources01")
        return _ChunkedReward.apply(images01, self, list(prompts), sources01, chunk_size, round_to_8_bits)

    def heads_of_tensor(
        self, images01: Tensor, prompts: Sequence[str], sources01: Tensor | None = None, round_to_8_bits: bool = False
    ) -> Tensor:
        """(mu, log sigma) of each head, [B, H, 2], as one graph with gradient to `images01`."""
        groups = [self._tensor_patches(images01, round_to_8_bits)]
        if sources01 is not None:
            with torch.no_grad():
                groups.insert(0, self._tensor_patches(sources01, round_to_8_bits))
        counts = [grid[0] * grid[1] // self.merge**2 for _, grid in groups]
        features = []
        for number, (patches, grid) in enumerate(groups):
            with torch.set_grad_enabled(torch.is_grad_enabled() and number == len(groups) - 1):
                found = self.network.image_features(list(patches), [grid] * patches.shape[0])
            features.append(found.view(patches.shape[0], counts[number], -1))
        trunk = self.tokenizer.trunk(counts)
        rows = [self._shared(trunk, branches) for branches in self.tokenizer.branches(list(prompts))]
        text = PackedText.pack(rows, self.tokenizer.padding_id).to(self.network.device)
        return self.network(torch.cat(features, dim=1).flatten(0, 1), text)

    def enable_activation_checkpointing(self) -> None:
        """Recompute activations in the backward pass of `differentiable`: less memory, one more forward pass.
        The backbone goes to train mode, for transformers skips checkpointing in eval mode; it has no active dropout."""
        self.network.backbone.activation_checkpointing_enable({"use_reentrant": False})
        self.network.backbone.train()

    def _check_rows(self, count: int, prompts: Sequence[str], sources: Sequence | Tensor | None) -> None:
        if (sources is None) != (self.spec.images == 1):
            need = "needs the source images too" if sources is None else "scores single images and takes no sources"
            raise ValueError(f"{self.kind} {need}")
        for name, other in (("prompts", prompts), ("sources", sources)):
            if other is not None and len(other) != count:
                raise ValueError(f"{count} images but {len(other)} {name}")

    def _pixels(self, image: Image.Image | Path) -> np.ndarray:
        read = pixels_from_file if isinstance(image, Path) else pixels_from_pil
        return read(image, self.patch * self.merge, self.spec.min_px, self.spec.max_px)

    def _image_tokens(self, size: tuple[int, ...]) -> int:
        return size[0] * size[1] // (self.patch * self.merge) ** 2

    def _shared(self, trunk: list[int], branches: list[list[int]]) -> tuple[list[int], list[list[int]]]:
        if not self.share_prefix:
            return trunk, branches
        common, rest = split_common(branches)
        return trunk + common, rest

    def _tensor_patches(self, images01: Tensor, round_to_8_bits: bool) -> tuple[Tensor, tuple[int, int]]:
        values = normalised_from_tensor(
            images01.to(self.network.device), self.patch * self.merge, self.spec.min_px, self.spec.max_px,
            self.spec.image_mean, self.spec.image_std, round_to_8_bits=round_to_8_bits,
        )  # fmt: skip
        grid = (values.shape[-2] // self.patch, values.shape[-1] // self.patch)
        return patchify(values, self.patch, self.merge, self.temporal), grid

    def _score_batch(self, batch: list[_Row]) -> Tensor:
        patches, grids = [], []
        for pixels in (each for row in batch for each in row.images):
            values = normalise_pixels(pixels, self.spec.image_mean, self.spec.image_std)
            patches.append(patchify(values[None], self.patch, self.merge, self.temporal)[0])
            grids.append((pixels.shape[0] // self.patch, pixels.shape[1] // self.patch))
        features = self.network.image_features(patches, grids)
        text = PackedText.pack([(row.trunk, row.branches) for row in batch], self.tokenizer.padding_id)
        return self.network(features, text.to(self.network.device))


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of rows by rising number of tokens, cut where a batch would pass `batch_size` rows or, padded,
    MAX_BATCH_TOKENS."""
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        full = not found or len(found[-1]) == batch_size
        if full or (len(found[-1]) + 1) * lengths[index] > MAX_BATCH_TOKENS:
            found.append([])
        found[-1].append(index)
    return found


def _prompt_error(prompt: object) -> str | None:
    """Why a prompt cannot be tokenized; one such text would fail the whole batch."""
    if not isinstance(prompt, str):
        return f"TypeError: the prompt is {type(prompt).__name__}, not text"
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        return f"{type(error).__name__}: the prompt is no valid Unicode: {error.reason}"
    return None


class _ChunkedReward(torch.autograd.Function):
    """Forward: mu and, where images need gradient, d mu / d image, chunk by chunk. Backward: one multiplication."""

    @staticmethod
    def forward(ctx, images01, model, prompts, sources01, chunk_size, round_to_8_bits):  # noqa: ANN001, ANN205
        scores, gradients = [], []
        for start in range(0, images01.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            chunk = images01[rows].detach().requires_grad_(ctx.needs_input_grad[0])
            sources = None if sources01 is None else sources01[rows].detach()
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                mu = model.heads_of_tensor(chunk, prompts[rows], sources, round_to_8_bits)[..., 0].mean(1)
                if ctx.needs_input_grad[0]:
                    gradients.append(torch.autograd.grad(mu.sum(), chunk)[0])
            scores.append(mu.detach().to(images01.device))
        ctx.save_for_backward(torch.cat(gradients) if gradients else torch.empty(0))
        return torch.cat(scores)

    @staticmethod
    def backward(ctx, grad_mu):  # noqa: ANN001, ANN205
        (gradients,) = ctx.saved_tensors
        return grad_mu.to(gradients.dtype).view(-1, 1, 1, 1) * gradients, None, None, None, None, None


def load_reward(
    model_dir: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, *, four_bit: bool = False
) -> RewardModel:
    """Load a reward model from a checkpoint directory: weights in either published layout, config.json, tokenizer,
    and optionally `reward_spec.json`. `dtype` is the backbone's; heads stay float32. `four_bit` quantises the decoder
    while loading (`rewards.four_bit`). Raises RewardCheckpointError."""
    network = load_network(Path(model_dir), device, dtype, four_bit=four_bit)
    return RewardModel(Path(model_dir), network, read_spec(Path(model_dir), network.config.model_type))
