"""The reward model that operators and recipes use: scores in batches, gradients to images in chunks.
One class for HPSv3 and EditReward; what differs between them is in the spec."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dreamlite_data.rewards.gradient import chunked
from dreamlite_data.rewards.network import PackedText, RewardNetwork, load_network
from dreamlite_data.rewards.packing import MAX_BATCH_TOKENS, PackedRows, Picture, RowPacker
from dreamlite_data.rewards.preprocess import check_images01, normalise_pixels, normalised_from_tensor, patchify
from dreamlite_data.rewards.scores import RewardScores
from dreamlite_data.rewards.spec import RewardSpec, read_spec
from dreamlite_data.rewards.stored import RewardCheckpointError, weight_files


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
        rows = network.backbone.get_input_embeddings().weight.shape[0]
        self.packer = RowPacker(self.model_dir, spec, network.config.vision_config, rows, share_prefix=share_prefix)
        self.patch, self.merge, self.temporal = self.packer.patch, self.packer.merge, self.packer.temporal
        self.tokenizer = self.packer.tokenizer
        # Ids come from the tokenizer; a config may still name the base model's.
        network.config.image_token_id = self.tokenizer.image_id

    @property
    def share_prefix(self) -> bool:
        """Whether what the prompts of a row share runs through the decoder once; changes no score."""
        return self.packer.share_prefix

    @share_prefix.setter
    def share_prefix(self, wanted: bool) -> None:
        self.packer.share_prefix = wanted

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
        images: Sequence[Picture],
        prompts: Sequence[str],
        sources: Sequence[Picture] | None = None,
        batch_size: int | None = 64,
    ) -> RewardScores:
        """Score images against prompts; `sources` are the images before the edit (EditReward needs them, HPSv3 refuses
        them). Rows are sorted by length and batched to at most `batch_size` rows; batching does not change a score.
        An image given as a file is opened, resized and closed in its turn. An image or a prompt that cannot be read
        costs its own row only."""
        return self.score_packed(self.packer.pack(images, prompts, sources), batch_size=batch_size)

    def score_packed(
        self, packed: PackedRows, batch_tokens: int = MAX_BATCH_TOKENS, batch_size: int | None = None
    ) -> RewardScores:
        """Score rows that a packer of this model prepared, in batches of `batch_tokens` tokens with their padding and,
        where given, of at most `batch_size` rows."""
        heads = np.full((len(packed.errors), len(self.spec.heads), 2), np.nan, np.float32)
        with torch.inference_mode():
            for batch in packed.batches(batch_tokens, batch_size):
                heads[packed.rows[batch]] = self._score_batch(packed, batch).cpu().numpy()
        return RewardScores.of(packed, heads)

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
        self.packer.check(images01.shape[0], prompts, sources01)
        check_images01(images01)
        if sources01 is not None:
            check_images01(sources01, "sources01")

        def mu_of(chunk: Tensor, texts: Sequence[str], sources: Tensor | None) -> Tensor:
            return self.heads_of_tensor(chunk, texts, sources, round_to_8_bits)[..., 0].mean(1)

        return chunked(mu_of, images01, prompts, sources01, chunk_size)

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
        rows = [self.packer.share(trunk, branches) for branches in self.tokenizer.branches(list(prompts))]
        text = PackedText.pack(rows, self.tokenizer.padding_id).to(self.network.device)
        return self.network(torch.cat(features, dim=1).flatten(0, 1), text)

    def enable_activation_checkpointing(self) -> None:
        """Recompute activations in the backward pass of `differentiable`: less memory, one more forward pass.
        The backbone goes to train mode, for transformers skips checkpointing in eval mode; it has no active dropout."""
        self.network.backbone.activation_checkpointing_enable({"use_reentrant": False})
        self.network.backbone.train()

    def _tensor_patches(self, images01: Tensor, round_to_8_bits: bool) -> tuple[Tensor, tuple[int, int]]:
        values = normalised_from_tensor(
            images01.to(self.network.device), self.patch * self.merge, self.spec.min_px, self.spec.max_px,
            self.spec.image_mean, self.spec.image_std, round_to_8_bits=round_to_8_bits,
        )  # fmt: skip
        grid = (values.shape[-2] // self.patch, values.shape[-1] // self.patch)
        return patchify(values, self.patch, self.merge, self.temporal), grid

    def _score_batch(self, packed: PackedRows, batch: np.ndarray) -> Tensor:
        images = packed.images_of(batch)
        grids = [(pixels.shape[0] // self.patch, pixels.shape[1] // self.patch) for pixels in images]
        patches: list[Tensor] = [torch.empty(0)] * len(images)
        for grid in set(grids):  # images of one size together: one call instead of one for each
            same = [number for number, each in enumerate(grids) if each == grid]
            values = normalise_pixels(np.stack([images[number] for number in same]), self.spec.image_mean, self.spec.image_std)
            for number, found in zip(same, patchify(values, self.patch, self.merge, self.temporal), strict=True):
                patches[number] = found
        features = self.network.image_features(patches, grids)
        text = PackedText.pack(packed.texts_of(batch), self.tokenizer.padding_id)
        return self.network(features, text.to(self.network.device))


def load_reward(
    model_dir: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, *, four_bit: bool = False
) -> RewardModel:
    """Load a reward model from a checkpoint directory: weights in either published layout, config.json, tokenizer,
    and optionally `reward_spec.json`. `dtype` is the backbone's; heads stay float32. `four_bit` quantises the decoder
    while loading (`rewards.four_bit`). Raises RewardCheckpointError."""
    network = load_network(Path(model_dir), device, dtype, four_bit=four_bit)
    return RewardModel(Path(model_dir), network, read_spec(Path(model_dir), network.config.model_type))
