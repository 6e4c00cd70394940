"""Settings of the data refresh: which sources, how many rows, which thresholds, on which executor.
Every group refuses unknown keys and says which key was probably meant."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class StrictSettings(BaseModel):
    """Base of every settings group: immutable, unknown keys refused with a did-you-mean."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    near = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(cls.model_fields)}"
                    raise ValueError(f"unknown key {key!r} in {cls.__name__}: {hint}")
        return values


class ScenesSettings(StrictSettings):
    """The small world as a source. `fault_share` of the rows is broken on purpose, so that filters can be graded."""

    t2i_rows: int = Field(8000, ge=0)
    edit_rows: int = Field(8000, ge=0)
    fault_share: float = Field(0.08, ge=0, le=0.5)
    seed: int = 0
    shard_rows: int = Field(1000, ge=1)


class PhotosSettings(StrictSettings):
    """Photos out of the scikit-image and scikit-learn wheels, resized to `max_px` on the longer side.
    `edits_per_image` exact edits (exposure, blur, ...) are made from each."""

    enabled: bool = True
    max_px: int = Field(256, ge=64)
    edits_per_image: int = Field(3, ge=0)


class ExtraSource(StrictSettings):
    """A source of the user's own: an image folder with .txt sidecars, or a folder of WebDataset shards."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    kind: Literal["folder", "webdataset"]
    path: Path
    licence: str | None = None


class IngestSettings(StrictSettings):
    """What may enter. Limits hold before any pixel is decoded, so that a decompression bomb costs nothing."""

    max_side_px: int = Field(16384, ge=64)
    max_image_px: int = Field(64_000_000, ge=4096)
    max_member_mb: int = Field(64, ge=1)
    folder_files_per_task: int = Field(512, ge=1)
    rows_per_task: int = Field(1024, ge=1)


class Benchmark(StrictSettings):
    """A benchmark that training data must not contain: a folder of its images (with .txt sidecars), or a .txt, .csv or .jsonl
    file of hashes, texts and canary strings."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    path: Path


class SemanticSettings(StrictSettings):
    """Groups of images that mean the same, by their embeddings. `max_distance` is 1 - cosine; `cells` 0 chooses their number
    by the number of images."""

    enabled: bool = False
    max_distance: float = Field(0.05, gt=0, lt=1)
    cells: int = Field(0, ge=0)


class PolicySettings(StrictSettings):
    """Thresholds that the policy files name as $parameters. Changing one costs a query, never a measurement."""

    min_side_px: int = 64
    min_sharpness: float = 0.5
    min_photo_sharpness: float = 0.35
    min_edited_fraction: float = 0.004
    max_outside_fraction: float = 0.02
    require_scene_language: bool = True
    sft_share: float = Field(0.35, gt=0, le=1)
    rl_rows_per_task: int = Field(4000, ge=1)
    heldout_share: float = Field(0.05, ge=0, lt=1)
    allow_unanimous: tuple[str, ...] = ()
    """Rules ("dataset.rule", or "*") that may pass or reject every row without that being an error."""


class RefreshSettings(StrictSettings):
    """Everything the refresh needs. `executor` and `workers` say where it runs and never change a byte of the result."""

    EXEC_FIELDS: ClassVar[frozenset[str]] = frozenset({"executor", "workers"})

    scenes: ScenesSettings = ScenesSettings()
    photos: PhotosSettings = PhotosSettings()
    extra_sources: tuple[ExtraSource, ...] = ()
    ingest: IngestSettings = IngestSettings()
    semantic: SemanticSettings = SemanticSettings()
    benchmarks: tuple[Benchmark, ...] = ()
    policy: PolicySettings = PolicySettings()
    executor: Literal["local", "ray"] = "local"
    workers: int = Field(2, ge=1)
