"""From dataset versions to batches: cached latents and prompt states, and a plan that any resume repeats exactly.
Every row is encoded once per version of the parts that encode it, whichever stages read it."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DreamLiteUNetModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from dreamlite_data.dataset import open_dataset, read_images
from dreamlite_data.lake import Lake
from dreamlite_data.progress import Progress
from trainers.conditioning import Embeddings, PromptEncoder, stack
from trainers.flow import Velocity, guided_velocity, keyed_uniform
from trainers.model import latent_scale
from trainers.parallel import map_threads
from trainers.pixels import to_tensor
from trainers.settings import DMD2Settings, ReFLSettings, SupervisedSettings
from trainers.throughput import counts_as_data_wait

ENCODE_ROWS = 32
PART_ROWS = 2_048  # rows a cache part holds: what a kill -9 can lose
MASK_CELLS = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """One training row: a caption and its image, or an instruction with source and target."""

    row_id: str
    task: str
    image_id: str
    source_image_id: str | None
    text: str
    edit_type: str | None
    edit_mask: bytes | None


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows ready for the network. `condition` is the right panel; `null` the states without the prompt (for an edit
    they still see the source); `weight` [B, 1, H, W] the foreground weight; `positions` the global sample indices."""

    latents: torch.Tensor
    condition: torch.Tensor
    text: Embeddings
    null: Embeddings
    is_edit: torch.Tensor
    weight: torch.Tensor
    rows: list[Row]
    positions: list[int]

    def split(self, size: int) -> list[Batch]:
        """Consecutive parts of at most `size` rows."""
        starts = range(0, len(self.rows), size)
        return [dataclasses.replace(self, **{name: _rows_of(value, start, size) for name, value in vars(self).items()}) for start in starts]

    def guided(self, unet: DreamLiteUNetModel, size_px: int, settings: ReFLSettings | DMD2Settings) -> Velocity:
        """The deployed guidance on these rows, with the scales that a recipe's settings name."""
        return guided_velocity(
            unet,
            self.condition,
            self.text,
            self.null,
            self.is_edit,
            size_px,
            settings.guidance_scale,
            settings.image_guidance_scale,
        )


def _rows_of(value: torch.Tensor | Embeddings | list, start: int, size: int) -> torch.Tensor | Embeddings | list:
    """Rows `start` to `start + size` of one field of a batch."""
    rows = slice(start, start + size)
    return Embeddings(value.states[rows], value.mask[rows]) if isinstance(value, Embeddings) else value[rows]


class TensorCache:
    """Named tensors on disk, append-only: parts of safetensors, each renamed into place when complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values: dict[str, torch.Tensor] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("part-*.safetensors")):
            with safe_open(path, framework="pt") as part:
                keys = json.loads(part.metadata()["keys"])
                flat, lengths = part.get_tensor("flat"), part.get_tensor("lengths").tolist()
            self.values.update(zip(keys, flat.split(lengths), strict=True))

    def fill(self, keys: Sequence[str], encode: Callable[[list[int]], list[torch.Tensor]], label: str) -> None:
        """Encode the keys that are missing; `encode` gets indices into `keys` and returns tensors [N_i, ...]."""
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        missing = sorted(index for key, index in first.items() if key not in self.values)
        if not missing:
            return
        with Progress(label, total=len(missing), unit="rows") as bar:
            for start in range(0, len(missing), PART_ROWS):
                part = missing[start : start + PART_ROWS]
                tensors: list[torch.Tensor] = []
                for encoded in map_threads(encode, [part[at : at + ENCODE_ROWS] for at in range(0, len(part), ENCODE_ROWS)]):
                    tensors += [tensor.to(torch.float16) for tensor in encoded]
                    bar.advance(len(encoded))
                self._write([keys[index] for index in part], tensors)

    def get(self, keys: Sequence[str]) -> list[torch.Tensor]:
        """The tensors of `keys`, float32."""
        return [self.values[key].float() for key in keys]

    def _write(self, keys: list[str], tensors: list[torch.Tensor]) -> None:
        lengths = torch.tensor([len(tensor) for tensor in tensors])
        name = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
        partial = self.folder / f".{name}.{os.getpid()}.partial"
        save_file({"flat": torch.cat(tensors).contiguous(), "lengths": lengths}, partial, {"keys": json.dumps(keys)})
        partial.rename(self.folder / f"part-{name}.safetensors")
        self.values.update(zip(keys, tensors, strict=True))


class TrainingRows:
    """The rows of one or more dataset versions with everything the network reads, encoded and cached."""

    def __init__(
        self,
        lake: Lake,
        datasets: Sequence[tuple[str, int | None]],
        *,
        split: str,
        vae: AutoencoderTiny,
        encoder: PromptEncoder,
        components_digest: str,
        size_px: int,
        limit: int | None = None,
        encode_images: bool = True,
    ) -> None:
        self.lake, self.size_px = lake, size_px
        self.side = size_px // latent_scale(vae.config)
        self.rows = read_rows(lake, datasets, split=split, limit=limit)
        self.by_task = {
            task: [index for index, row in enumerate(self.rows) if row.task == task] for task in ("generate", "edit")
        }
        cache = lake.root / "files" / "cache"
        suffix = f"{components_digest[:16]}-{size_px}-{encoder.hidden_state}"
        self.latents = TensorCache(cache / f"latents-{suffix}")
        self.states = TensorCache(cache / f"states-{suffix}")
        wanted = {row.source_image_id for row in self.rows if row.source_image_id}
        if encode_images:
            wanted |= {row.image_id for row in self.rows}
        self._fill_latents(sorted(wanted), vae)
        self._fill_states(encoder)

    def latent(self, image_ids: Sequence[str]) -> torch.Tensor:
        """Latents [N, 4, side, side] of images."""
        return torch.stack([tensor.reshape(4, self.side, self.side) for tensor in self.latents.get(list(image_ids))])

    @counts_as_data_wait
    def batch(self, indices: Sequence[int], positions: Sequence[int], *, with_target: bool = True) -> Batch:
        """Assemble rows; `with_target=False` leaves `latents` zero (prompts of ReFL and DMD2 need no target)."""
        rows = [self.rows[index] for index in indices]
        zeros = torch.zeros(len(rows), 4, self.side, self.side)
        condition = zeros.clone()
        edits = [index for index, row in enumerate(rows) if row.task == "edit"]
        if edits:
            condition[edits] = self.latent([rows[index].source_image_id or "" for index in edits])
        return Batch(
            latents=self.latent([row.image_id for row in rows]) if with_target else zeros,
            condition=condition,
            text=stack(self.states.get([state_key(row, row.text) for row in rows])),
            null=stack(self.states.get([state_key(row, None) for row in rows])),
            is_edit=torch.tensor([row.task == "edit" for row in rows]),
            weight=torch.stack([foreground(row, self.side) for row in rows]),
            rows=rows,
            positions=list(positions),
        )

    def _fill_latents(self, image_ids: list[str], vae: AutoencoderTiny) -> None:
        @torch.no_grad()
        def encode(chunk: list[int]) -> list[torch.Tensor]:
            pixels = np.stack([np.asarray(image) for image in self.images([image_ids[index] for index in chunk])])
            return list(vae.encoder(to_tensor(pixels)).flatten(1))

        self.latents.fill(image_ids, encode, "latents")

    def _fill_states(self, encoder: PromptEncoder) -> None:
        jobs = [(row, text) for row in self.rows for text in (row.text, None)]

        def encode_task(task: str) -> None:
            chosen = [(row, text) for row, text in jobs if row.task == task]

            def encode(chunk: list[int]) -> list[torch.Tensor]:
                part = [chosen[index] for index in chunk]
                if task == "generate":
                    return encoder.generate([text for _, text in part]).rows()
                images = self.images([row.source_image_id or "" for row, _ in part])
                return encoder.edit(images, [text for _, text in part]).rows()

            self.states.fill([state_key(row, text) for row, text in chosen], encode, f"prompt states, {task}")

        for task in ("generate", "edit"):
            encode_task(task)

    def images(self, image_ids: Sequence[str]) -> list[Image.Image]:
        """Stored images as RGB squares of `size_px`."""
        stored = read_images(self.lake, list(dict.fromkeys(image_ids)))
        decoded = {
            image_id: square(Image.open(io.BytesIO(content)), self.size_px) for image_id, content in stored.items()
        }
        return [decoded[image_id] for image_id in image_ids]


def read_rows(
    lake: Lake, datasets: Sequence[tuple[str, int | None]], *, split: str, limit: int | None = None
) -> list[Row]:
    """Rows of one split, in dataset order; raises DatasetError where a dataset has none."""
    rows: list[Row] = []
    for name, version in datasets:
        dataset = open_dataset(lake, name, version)
        dataset.require(["row_id", "task", "image_id", "text", "split"])
        columns = [field.name for field in dataclasses.fields(Row)]
        found = [Row(**{column: record[column] for column in columns}) for record in dataset.split(split).to_pylist()]
        rows += found[:limit] if limit else found
    return rows


def square(image: Image.Image, size_px: int) -> Image.Image:
    """Centre-crop to a square and resize to `size_px` (Lanczos); the same crop for source and target."""
    image = image.convert("RGB")
    if image.size == (size_px, size_px):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size_px, size_px), Image.Resampling.LANCZOS)


def state_key(row: Row, text: str | None) -> str:
    """Cache key of prompt states: task, text, and for an edit the source that the encoder sees."""
    parts = [row.task, "null" if text is None else "text:" + text, (row.source_image_id or "") if row.task == "edit" else ""]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def foreground(row: Row, side: int, cap: float = float("inf")) -> torch.Tensor:
    """Weight [1, side, side]: log2(A_total / A_edit) + 1 on edited latents, 1 elsewhere and for generate rows.

    The formula of the paper's foreground loss (DreamLite, also UniWorld-V1 arXiv 2506.03147): 50 % edited -> 2.0,
    10 % -> 4.32. `cap` bounds it for tiny areas; a recipe applies its own.
    """
    if row.task != "edit" or not row.edit_mask:
        return torch.ones(1, side, side)
    cells = torch.from_numpy(np.frombuffer(row.edit_mask, dtype=np.uint8).reshape(MASK_CELLS, MASK_CELLS) > 0)
    mask = torch.nn.functional.interpolate(cells.float()[None, None], size=(side, side), mode="nearest")[0]
    area = mask.mean().item()
    weight = min(np.log2(1 / area) + 1, cap) if area > 0 else 1.0
    return torch.where(mask > 0, float(weight), 1.0)


class Plan:
    """Which rows make up batch `step`: exact task counts, a keyed permutation per epoch, a pure function of the seed."""

    def __init__(self, rows: TrainingRows, tasks: dict[str, float], batch: int, key: tuple[int, ...]) -> None:
        self.rows, self.batch, self.key = rows, batch, key
        counts = {task: int(round(share * batch)) for task, share in tasks.items()}
        if sum(counts.values()) != batch or any(count / batch != tasks[task] for task, count in counts.items()):
            raise ValueError(f"a batch of {batch} cannot hold the task shares {tasks} exactly: change `batch`")
        for task, count in counts.items():
            if count and not rows.by_task[task]:
                raise ValueError(f"the stage trains on {task!r} rows, but its datasets hold none: check `datasets` and `tasks`")
        self.counts = counts
        self._orders: dict[tuple[str, int], np.ndarray] = {}

    def indices(self, step: int) -> tuple[list[int], list[int]]:
        """(row indices, global sample positions) of batch `step`."""
        chosen: list[int] = []
        for number, (task, count) in enumerate(self.counts.items()):
            pool = self.rows.by_task[task]
            for position in range(step * count, (step + 1) * count):
                epoch, place = divmod(position, len(pool))
                chosen.append(pool[self._order(task, number, epoch, len(pool))[place]])
        return chosen, list(range(step * self.batch, (step + 1) * self.batch))

    def _order(self, task: str, number: int, epoch: int, size: int) -> np.ndarray:
        if (task, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key[1] >= epoch - 1}
            self._orders[task, epoch] = np.random.default_rng((*self.key, number, epoch)).permutation(size)
        return self._orders[task, epoch]


def drop_conditions(batch: Batch, settings: SupervisedSettings, key: tuple[int, ...]) -> Batch:
    """Drop prompts and sources so that every branch of the deployed guidance is trained.

    generate: the prompt alone; edit: the instruction alone (source kept), or both (zero panel, null states that still
    see the source). One keyed draw a row decides, so a resumed run drops the same rows.
    """
    draws = keyed_uniform((*key, 1), batch.positions, 1)[:, 0]
    both = batch.is_edit & (draws < settings.drop_both_edit)
    text = torch.where(batch.is_edit, draws < settings.drop_both_edit + settings.drop_text_edit, draws < settings.drop_text)
    rows = [
        null if dropped else full
        for full, null, dropped in zip(batch.text.rows(), batch.null.rows(), text.tolist(), strict=True)
    ]
    condition = torch.where(both.view(-1, 1, 1, 1), torch.zeros_like(batch.condition), batch.condition)
    return dataclasses.replace(batch, text=stack(rows), condition=condition)
