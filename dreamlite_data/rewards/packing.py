"""The CPU half of scoring: images and prompts to plain arrays that need no weights and cross to another process as they are.
The other half, `RewardModel.score_packed`, sees nothing but these arrays."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreamlite_data.rewards.loader import vocabulary_rows
from dreamlite_data.rewards.preprocess import opened_image, pixels_from_pil
from dreamlite_data.rewards.spec import RewardSpec, read_spec
from dreamlite_data.rewards.stored import read_headers, weight_files
from dreamlite_data.rewards.text import RewardTokenizer, split_common

MAX_BATCH_TOKENS = 32_768
"""Decoder tokens of one scoring batch, 40 rows of HPSv3, hundreds of small-world rows; and of one row, whose error more is: the
bases of HPSv3 and EditReward know 32,768 positions."""

Picture = Image.Image | Path | bytes
"""An image, its file, or the bytes of its file: those are opened here, so that a broken one is an error of its row."""


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """B rows of which N could be packed. `rows` int64 [N] says which; `errors` has B entries, None where packed.

    `pixels` is uint8, every image [H, W, 3] of every row laid end to end, `sizes` int32 [N, images, 2] their (H, W).
    `ids` is int32, each row's trunk and branches end to end, `lengths` int32 [N, 1 + heads] how many of each.
    """

    rows: np.ndarray
    pixels: np.ndarray
    sizes: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    errors: tuple[str | None, ...]

    @property
    def n_tokens(self) -> np.ndarray:
        """Decoder tokens of each packed row, int64 [N]."""
        return self.lengths.sum(1, dtype=np.int64)

    def batches(self, max_tokens: int, max_rows: int | None = None) -> list[np.ndarray]:
        """Packed rows in batches of at most `max_tokens` with their padding (one row may pass it alone), shortest first:
        rows of one length stand together, so that little is padded."""
        return [np.asarray(batch) for batch in batches(self.n_tokens.tolist(), max_rows, max_tokens)]

    def images_of(self, batch: np.ndarray) -> list[np.ndarray]:
        """The images [H, W, 3] of these rows, in the order of the rows."""
        starts = self._image_starts()
        found = []
        for row in batch.tolist():
            for number, (height, width) in enumerate(self.sizes[row].tolist()):
                start = int(starts[row, number])
                found.append(self.pixels[start : start + height * width * 3].reshape(height, width, 3))
        return found

    def _image_starts(self) -> np.ndarray:
        volumes = self.sizes.astype(np.int64).prod(-1) * 3
        return np.concatenate([[0], volumes.ravel().cumsum()[:-1]]).reshape(volumes.shape) if volumes.size else volumes

    def texts_of(self, batch: np.ndarray) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        """(trunk ids, ids of each branch) of these rows."""
        starts = np.concatenate([[0], self.n_tokens.cumsum()])
        found = []
        for row in batch.tolist():
            cuts = int(starts[row]) + np.concatenate([[0], self.lengths[row].cumsum()])
            parts = [self.ids[start:stop] for start, stop in itertools.pairwise(cuts.tolist())]
            found.append((parts[0], parts[1:]))
        return found


class RowPacker:
    """Decodes, resizes and tokenizes for one reward model. `rows` is how many rows the token embedding has."""

    def __init__(self, model_dir: Path, spec: RewardSpec, vision_config: Any, rows: int, *, share_prefix: bool = True) -> None:
        self.spec, self.share_prefix = spec, share_prefix
        self.patch, self.merge, self.temporal = (
            vision_config.patch_size,
            vision_config.spatial_merge_size,
            vision_config.temporal_patch_size,
        )
        self.tokenizer = RewardTokenizer(Path(model_dir), spec, rows)

    def check(self, count: int, prompts: Sequence[str], sources: Sequence | Any | None) -> None:
        """Raise ValueError where the columns do not fit one another or this model."""
        if (sources is None) != (self.spec.images == 1):
            need = "needs the source images too" if sources is None else "scores single images and takes no sources"
            raise ValueError(f"{self.spec.kind} {need}")
        for name, other in (("prompts", prompts), ("sources", sources)):
            if other is not None and len(other) != count:
                raise ValueError(f"{count} images but {len(other)} {name}")

    def pack(self, images: Sequence[Picture], prompts: Sequence[str], sources: Sequence[Picture] | None = None) -> PackedRows:
        """Pack every row that can be; whatever a row's image or prompt raises becomes its entry in `errors`."""
        self.check(len(images), prompts, sources)
        errors = [prompt_error(prompt) for prompt in prompts]
        rows, pixels, sizes, ids, lengths = [], [], [], [], []
        branches = self.tokenizer.branches([prompt if error is None else "" for prompt, error in zip(prompts, errors, strict=True)])
        for index, image in enumerate(images):
            group = [image] if sources is None else [sources[index], image]
            if errors[index]:
                continue
            try:
                found = [self.pixels(each) for each in group]
            except Exception as error:  # the contract: a bad row is a result
                errors[index] = f"{type(error).__name__}: {error}"[:500]
                continue
            trunk, own = self.share(self.tokenizer.trunk([self.image_tokens(each.shape[:2]) for each in found]), branches[index])
            parts = [trunk, *own]
            count = sum(map(len, parts))
            if count > MAX_BATCH_TOKENS:
                errors[index] = f"ValueError: the prompt makes {count:,} tokens, more than {MAX_BATCH_TOKENS:,}"
                continue
            rows.append(index)
            pixels += [each.reshape(-1) for each in found]
            sizes.append([each.shape[:2] for each in found])
            ids += [np.asarray(part, np.int32) for part in parts]
            lengths.append([len(part) for part in parts])
        return PackedRows(
            np.asarray(rows, np.int64),
            np.concatenate(pixels) if pixels else np.empty(0, np.uint8),
            np.asarray(sizes, np.int32).reshape(len(rows), self.spec.images, 2),
            np.concatenate(ids) if ids else np.empty(0, np.int32),
            np.asarray(lengths, np.int32).reshape(len(rows), 1 + len(self.spec.heads)),
            tuple(errors),
        )

    def pixels(self, picture: Picture) -> np.ndarray:
        """uint8 [H, W, 3] of the size that this model sees."""
        with opened_image(picture) as image:
            return pixels_from_pil(image, self.patch * self.merge, self.spec.min_px, self.spec.max_px)

    def image_tokens(self, size: tuple[int, ...]) -> int:
        """Tokens of an image of (H, W) pixels after resizing."""
        return size[0] * size[1] // (self.patch * self.merge) ** 2

    def share(self, trunk: list[int], branches: list[list[int]]) -> tuple[list[int], list[list[int]]]:
        """Move what all branches begin with into the trunk, where that is wanted."""
        if not self.share_prefix:
            return trunk, branches
        common, rest = split_common(branches)
        return trunk + common, rest


def batches(lengths: Sequence[int], max_rows: int | None, max_tokens: int = MAX_BATCH_TOKENS) -> list[list[int]]:
    """Indices of rows by rising number of tokens, cut where a batch would pass `max_rows` rows or, padded, `max_tokens`."""
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        full = not found or len(found[-1]) == max_rows
        if full or (len(found[-1]) + 1) * lengths[index] > max_tokens:
            found.append([])
        found[-1].append(index)
    return found


def prompt_error(prompt: object) -> str | None:
    """Why a prompt cannot be tokenized; one such text would fail the whole batch."""
    if not isinstance(prompt, str):
        return f"TypeError: the prompt is {type(prompt).__name__}, not text"
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        return f"{type(error).__name__}: the prompt is no valid Unicode: {error.reason}"
    return None


def load_packer(model_dir: Path | str) -> RowPacker:
    """The packer of a checkpoint directory; reads config, tokenizer and the headers of the weights, but no weight.
    Raises RewardCheckpointError as `load_reward` does."""
    from dreamlite_data.rewards.network import read_config

    folder = Path(model_dir)
    rows = vocabulary_rows(read_headers(weight_files(folder)), folder)
    config = read_config(folder)
    return RowPacker(folder, read_spec(folder, config.model_type), config.vision_config, rows)
