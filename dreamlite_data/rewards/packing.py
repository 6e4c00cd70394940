"""The CPU half of scoring: images and prompts to plain arrays that need no weights and cross to another process as they are.
The other half, `RewardModel.score_packed`, sees nothing but these arrays."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreamlite_data.rewards.loader import RewardCheckpointError, stored_shapes, vocabulary_rows, weight_files
from dreamlite_data.rewards.preprocess import pixels_from_pil
from dreamlite_data.rewards.spec import RewardSpec, read_spec
from dreamlite_data.rewards.text import RewardTokenizer, split_common

MAX_ROW_TOKENS = 32_768
"""Decoder tokens of one row; more is an error of that row. HPSv3's and EditReward's bases take 32,768 positions."""

Picture = Image.Image | bytes
"""An image, or the bytes of its file: those are decoded here, so that a broken one is an error of its row."""


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
        lengths = self.n_tokens
        batches: list[list[int]] = []
        for row in np.argsort(lengths, kind="stable").tolist():
            full = not batches or len(batches[-1]) == max_rows or (len(batches[-1]) + 1) * int(lengths[row]) > max_tokens
            if full:
                batches.append([])
            batches[-1].append(row)
        return [np.asarray(batch) for batch in batches]

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

    def texts_of(self, batch: np.ndarray) -> list[tuple[list[int], list[list[int]]]]:
        """(trunk ids, ids of each branch) of these rows."""
        starts = np.concatenate([[0], self.n_tokens.cumsum()])
        found = []
        for row in batch.tolist():
            cuts = int(starts[row]) + np.concatenate([[0], self.lengths[row].cumsum()])
            parts = [self.ids[start:stop].tolist() for start, stop in zip(cuts, cuts[1:], strict=False)]
            found.append((parts[0], parts[1:]))
        return found


class RowPacker:
    """Decodes, resizes and tokenizes for one reward model. `rows` is how many rows the token embedding has."""

    def __init__(self, model_dir: Path, spec: RewardSpec, vision_config: Any, rows: int, *, share_prefix: bool = True) -> None:
        self.spec, self.share_prefix = spec, share_prefix
        self.patch, self.merge, self.temporal = vision_config.patch_size, vision_config.spatial_merge_size, vision_config.temporal_patch_size
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
        errors: list[str | None] = [None] * len(images)
        rows, pixels, sizes, ids, lengths = [], [], [], [], []
        branches = self.tokenizer.branches([str(prompt) for prompt in prompts])
        for index, image in enumerate(images):
            group = [image] if sources is None else [sources[index], image]
            if prompts[index] is None:
                errors[index] = "the row has no text"
                continue
            try:
                found = [self.pixels(opened(each)) for each in group]
            except Exception as error:  # the contract: a bad row is a result
                errors[index] = f"{type(error).__name__}: {error}"[:500]
                continue
            trunk, own = self.share(self.tokenizer.trunk([self.image_tokens(each.shape[:2]) for each in found]), branches[index])
            parts = [trunk, *own]
            if sum(map(len, parts)) > MAX_ROW_TOKENS:
                errors[index] = f"the row has {sum(map(len, parts))} tokens, more than {MAX_ROW_TOKENS}: shorten its text"
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

    def pixels(self, image: Image.Image) -> np.ndarray:
        """uint8 [H, W, 3] of the size that this model sees."""
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


def opened(picture: Picture) -> Image.Image:
    """The image of a file's bytes; an image as it is. Raises what Pillow raises."""
    return Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture


def load_packer(model_dir: Path | str) -> RowPacker:
    """The packer of a checkpoint directory; reads config, tokenizer and the headers of the weights, but no weight.
    Raises RewardCheckpointError as `load_reward` does."""
    from transformers import AutoConfig

    folder = Path(model_dir)
    files = weight_files(folder)
    if not (folder / "config.json").exists():
        raise RewardCheckpointError(f"{folder} has no config.json; copy it from the base model")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    rows = vocabulary_rows(stored_shapes(files), folder)
    return RowPacker(folder, read_spec(folder, config.model_type), config.vision_config, rows)
