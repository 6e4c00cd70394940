"""From dataset versions to batches: cached latents and prompt states, panels of the rows' shapes, condition drop-out.
Every row is encoded once per version of the parts that encode it, whichever stages read it."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderTiny, DreamLiteUNetModel
from PIL import Image

from dreamlite_data.dataset import open_dataset, read_images
from dreamlite_data.lake import Lake
from trainers.batch_plan import Panel, bucket_panels, crop_box, nearest_panel
from trainers.conditioning import GENERATE_TOKENS, Embeddings, PromptEncoder, stack
from trainers.flow import Velocity, guided_velocity, keyed_uniform
from trainers.model import latent_scale
from trainers.pixels import to_tensor
from trainers.settings import DMD2Settings, ReFLSettings, SupervisedSettings
from trainers.tensor_cache import TensorCache
from trainers.throughput import counts_as_data_wait

MASK_CELLS = 8
COLUMNS: Mapping[str, tuple[str, ...]] = MappingProxyType({"generate": (), "edit": ("source_image_id",)})
"""What every recipe needs of a task's rows beyond row_id, image, text and split."""


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
    they still see the source); `weight` [B, 1, H, W] the foreground weight; `size_px` [B, 2] the logical (width, height) of one
    panel, which time_ids carry; `positions` the global sample indices."""

    latents: torch.Tensor
    condition: torch.Tensor
    text: Embeddings
    null: Embeddings
    is_edit: torch.Tensor
    weight: torch.Tensor
    size_px: torch.Tensor
    rows: list[Row]
    positions: list[int]

    def split(self, size: int) -> list[Batch]:
        """Consecutive parts of at most `size` rows."""
        starts = range(0, len(self.rows), size)
        return [dataclasses.replace(self, **{name: _rows_of(value, start, size) for name, value in vars(self).items()}) for start in starts]

    @property
    def device(self) -> torch.device:
        """Where the tensors are: what `TrainingRows` hands out is on the CPU."""
        return self.condition.device

    def to(self, device: torch.device) -> Batch:
        """The same rows on a device, where every loss expects them; nothing is copied where they are there already."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, (torch.Tensor, Embeddings))}
        return dataclasses.replace(self, **moved)

    def guided(self, unet: DreamLiteUNetModel, settings: ReFLSettings | DMD2Settings) -> Velocity:
        """The deployed guidance on these rows, with the scales and the precision that a recipe's settings name."""
        return guided_velocity(
            unet,
            self.condition,
            self.text,
            self.null,
            self.is_edit,
            self.size_px,
            settings.guidance_scale,
            settings.image_guidance_scale,
            settings.precision,
        )


def _rows_of(value: torch.Tensor | Embeddings | list, start: int, size: int) -> torch.Tensor | Embeddings | list:
    """Rows `start` to `start + size` of one field of a batch."""
    rows = slice(start, start + size)
    return Embeddings(value.states[rows], value.mask[rows]) if isinstance(value, Embeddings) else value[rows]


class TrainingRows:
    """The rows of one or more dataset versions with everything the network reads, encoded and cached.

    Rows are encoded where `vae` and `encoder` are; the caches and the batches are on the CPU.
    Every panel is a square of `size_px`, or with `aspect_buckets` the shape of about that area which is nearest to the target
    image; an edit's source takes the shape of its target. `logical_size_px` is the size that time_ids tell (default: the real one).
    """

    panels: Mapping[str, Panel] = MappingProxyType({})
    """Panels of the rows, by row_id, that are not the square."""
    image_sizes: Mapping[str, tuple[int, int]] = MappingProxyType({})
    """(width, height) of stored images; where one is missing its edit mask is taken as it is."""
    logical_size_px: int | None = None

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
        columns: Mapping[str, Sequence[str]] = MappingProxyType({}),
        aspect_buckets: bool = False,
        logical_size_px: int | None = None,
    ) -> None:
        self.lake, self.size_px, self.logical_size_px = lake, size_px, logical_size_px
        self.side = size_px // latent_scale(vae.config)
        self.rows = read_rows(lake, datasets, split=split, limit=limit, columns=columns)
        self.by_task = {
            task: [index for index, row in enumerate(self.rows) if row.task == task] for task in ("generate", "edit")
        }
        self.image_sizes = stored_sizes(lake, [row.image_id for row in self.rows])
        if aspect_buckets:
            shapes = bucket_panels(size_px)
            nearest = {row.row_id: nearest_panel(*self.image_sizes[row.image_id], shapes) for row in self.rows}
            self.panels = {row_id: panel for row_id, panel in nearest.items() if panel != (size_px, size_px)}
        cache = lake.root / "files" / "cache"
        suffix = f"{components_digest[:16]}-{size_px}-{encoder.hidden_state}"
        self.latents = TensorCache(cache / f"latents-{suffix}")
        self.states = TensorCache(cache / f"states-{suffix}-{GENERATE_TOKENS}")
        wanted = {(row.source_image_id, self.panel(row)) for row in self.rows if row.source_image_id}
        if encode_images:
            wanted |= {(row.image_id, self.panel(row)) for row in self.rows}
        for panel in sorted({panel for _, panel in wanted}):
            self._fill_latents(sorted(image_id for image_id, shape in wanted if shape == panel), panel, vae)
        self._fill_states(encoder)

    def panel(self, row: Row) -> Panel:
        """(height, width) in pixels of a row's panel."""
        return self.panels.get(row.row_id, (self.size_px, self.size_px))

    def pools(self) -> dict[Panel, dict[str, list[int]]]:
        """Indices of the rows by panel and task: what one batch may hold."""
        pools: dict[Panel, dict[str, list[int]]] = {}
        for task, indices in self.by_task.items():
            for index in indices:
                pools.setdefault(self.panel(self.rows[index]), {}).setdefault(task, []).append(index)
        return pools

    def latent(self, image_ids: Sequence[str], panel: Panel) -> torch.Tensor:
        """Latents [N, 4, height, width] of images cut to one panel."""
        keys = [self._latent_key(image_id, panel) for image_id in image_ids]
        return torch.stack([tensor.reshape(4, *self._grid(panel)) for tensor in self.latents.get(keys)])

    def _grid(self, panel: Panel) -> tuple[int, int]:
        """(height, width) of a panel in latents."""
        return panel[0] * self.side // self.size_px, panel[1] * self.side // self.size_px

    def _latent_key(self, image_id: str, panel: Panel) -> str:
        return image_id if panel == (self.size_px, self.size_px) else f"{image_id}/{panel[0]}x{panel[1]}"

    @counts_as_data_wait
    def batch(self, indices: Sequence[int], positions: Sequence[int], *, with_target: bool = True) -> Batch:
        """Assemble rows of one panel shape; `with_target=False` leaves `latents` zero (prompts of ReFL and DMD2 need no target)."""
        rows = [self.rows[index] for index in indices]
        panel = self.panel(rows[0])
        zeros = torch.zeros(len(rows), 4, *self._grid(panel))
        condition = zeros.clone()
        edits = [index for index, row in enumerate(rows) if row.task == "edit"]
        if edits:
            condition[edits] = self.latent([rows[index].source_image_id or "" for index in edits], panel)
        logical = (self.logical_size_px or self.size_px) / self.size_px
        return Batch(
            latents=self.latent([row.image_id for row in rows], panel) if with_target else zeros,
            condition=condition,
            text=stack(self.states.get([state_key(row, row.text, self.panels.get(row.row_id)) for row in rows])),
            null=stack(self.states.get([state_key(row, None, self.panels.get(row.row_id)) for row in rows])),
            is_edit=torch.tensor([row.task == "edit" for row in rows]),
            weight=torch.stack([foreground(row, self._grid(panel), image_size=self.image_sizes.get(row.image_id)) for row in rows]),
            size_px=torch.tensor([[panel[1] * logical, panel[0] * logical]]).expand(len(rows), 2),
            rows=rows,
            positions=list(positions),
        )

    def _fill_latents(self, image_ids: list[str], panel: Panel, vae: AutoencoderTiny) -> None:
        @torch.no_grad()
        def encode(chunk: list[int]) -> list[torch.Tensor]:
            pixels = np.stack([np.asarray(image) for image in self.images([(image_ids[index], panel) for index in chunk])])
            return list(vae.encoder(to_tensor(pixels, vae.device)).flatten(1).cpu())

        self.latents.fill([self._latent_key(image_id, panel) for image_id in image_ids], encode, "latents")

    def _fill_states(self, encoder: PromptEncoder) -> None:
        jobs = [(row, text) for row in self.rows for text in (row.text, None)]

        def encode_task(task: str) -> None:
            chosen = [(row, text) for row, text in jobs if row.task == task]

            def encode(chunk: list[int]) -> list[torch.Tensor]:
                part = [chosen[index] for index in chunk]
                if task == "generate":
                    return encoder.generate([text for _, text in part]).to("cpu").rows()
                images = self.images([(row.source_image_id or "", self.panel(row)) for row, _ in part])
                return encoder.edit(images, [text for _, text in part]).to("cpu").rows()

            self.states.fill([state_key(row, text, self.panels.get(row.row_id)) for row, text in chosen], encode, f"prompt states, {task}")

        for task in ("generate", "edit"):
            encode_task(task)

    def images(self, wanted: Sequence[tuple[str, Panel]]) -> list[Image.Image]:
        """Stored images as RGB, each cut to its panel."""
        stored = read_images(self.lake, list(dict.fromkeys(image_id for image_id, _ in wanted)))
        decoded = {(image_id, panel): fitted(Image.open(io.BytesIO(stored[image_id])), panel) for image_id, panel in dict.fromkeys(wanted)}
        return [decoded[each] for each in wanted]


def read_rows(
    lake: Lake,
    datasets: Sequence[tuple[str, int | None]],
    *,
    split: str,
    limit: int | None = None,
    columns: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> list[Row]:
    """Rows of one split, in dataset order. `columns` names what a recipe needs of each task beyond what every row has;
    raises DatasetError where a dataset lacks one, has a row without a value in it, or has no rows."""
    rows: list[Row] = []
    fields = [field.name for field in dataclasses.fields(Row)]
    for name, version in datasets:
        dataset = open_dataset(lake, name, version)
        dataset.require(["row_id", "task", "image_id", "text", "split"])
        tasks = set(dataset.rows["task"].to_pylist())
        for task in sorted(tasks & {"generate", "edit"}):
            dataset.require([*COLUMNS[task], *columns.get(task, ())], task)
        found = [Row(**{column: record[column] for column in fields}) for record in dataset.split(split).to_pylist()]
        rows += found[:limit] if limit else found
    return rows


def stored_sizes(lake: Lake, image_ids: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(width, height) of each stored image."""
    found = lake.query(
        "SELECT image_id, width, height FROM images SEMI JOIN wanted ON wanted.id = images.image_id",
        wanted=pa.table({"id": pa.array(sorted(set(image_ids)), pa.string())}),
    )
    return {row["image_id"]: (row["width"], row["height"]) for row in found.to_pylist()}


def fitted(image: Image.Image, panel: Panel) -> Image.Image:
    """Centre-crop to the shape of a panel and resize to it (Lanczos); the same crop for source and target."""
    image = image.convert("RGB")
    if image.size == (panel[1], panel[0]):
        return image
    return image.crop(crop_box(*image.size, panel)).resize((panel[1], panel[0]), Image.Resampling.LANCZOS)


def square(image: Image.Image, size_px: int) -> Image.Image:
    """`fitted` to a square."""
    return fitted(image, (size_px, size_px))


def state_key(row: Row, text: str | None, panel: Panel | None = None) -> str:
    """Cache key of prompt states: task, text, and for an edit the source that the encoder sees, with a panel that is no square."""
    parts = [row.task, "null" if text is None else "text:" + text, (row.source_image_id or "") if row.task == "edit" else ""]
    if panel and row.task == "edit":
        parts.append(f"{panel[0]}x{panel[1]}")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def foreground(
    row: Row, grid: tuple[int, int], cap: float = float("inf"), image_size: tuple[int, int] | None = None
) -> torch.Tensor:
    """Weight [1, height, width]: log2(A_total / A_edit) + 1 on edited latents, 1 elsewhere and for generate rows.

    The formula of the paper's foreground loss (DreamLite, also UniWorld-V1 arXiv 2506.03147): 50 % edited -> 2.0,
    10 % -> 4.32. `cap` bounds it for tiny areas; a recipe applies its own. The mask is of the whole image, of which a panel of
    another shape shows a part: `image_size` (width, height) says which.
    """
    if row.task != "edit" or not row.edit_mask:
        return torch.ones(1, *grid)
    cells = np.frombuffer(row.edit_mask, dtype=np.uint8).reshape(MASK_CELLS, MASK_CELLS) > 0
    width, height = image_size or (grid[1], grid[0])
    left, top, right, bottom = crop_box(width, height, grid)
    down, along = (
        ((low + (np.arange(count) + 0.5) / count * (high - low)) / whole * MASK_CELLS).astype(int)
        for low, high, whole, count in ((top, bottom, height, grid[0]), (left, right, width, grid[1]))
    )
    mask = torch.from_numpy(cells[down][:, along])[None]
    area = mask.float().mean().item()
    weight = min(np.log2(1 / area) + 1, cap) if area > 0 else 1.0
    return torch.where(mask, float(weight), 1.0)


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


def encoders_digest(folder: Path) -> str:
    """sha256 over the parts that make latents and prompt states: their cached outputs are keyed by it."""
    return parts_digest(folder, "vae", "text_encoder", "tokenizer", "processor")


def parts_digest(folder: Path, *parts: str) -> str:
    """sha256 over the names and contents of all files of some parts of a folder in diffusers layout."""
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted((folder / part).rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").digest()
                digest.update(str(path.relative_to(folder)).encode() + b"\0" + content)
    return digest.hexdigest()
