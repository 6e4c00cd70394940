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
    min_similarity: float | None = Field(None, gt=0, le=1)
    max_nsfw: float | None = Field(None, gt=0, lt=1)
    max_face_fraction: float | None = Field(None, gt=0, lt=1)
    max_watermark: float | None = Field(None, gt=0, lt=1)
    max_text_fraction: float | None = Field(None, gt=0, lt=1)
    allow_unanimous: tuple[str, ...] = ()
    """Rules ("dataset.rule", or "*") that may pass or reject every row without that being an error."""


CaptionStyle = Literal["tag", "short", "medium", "dense"]


class CaptionBackend(StrictSettings):
    """Who writes captions, in which styles. The scene reader reads every image anyway, for verification; with styles it also
    writes them. `transformers` takes `model` as a folder or hub id (with `revision`), `endpoint` as the name that the
    OpenAI-compatible server at `base_url` serves; its key comes from the environment variable `key_variable`."""

    EXEC_FIELDS: ClassVar[frozenset[str]] = frozenset(
        {"base_url", "key_variable", "timeout_s", "attempts", "concurrency", "tries", "num_gpus", "batch_images"}
    )

    backend: Literal["scene", "transformers", "endpoint"] = "scene"
    styles: tuple[CaptionStyle, ...] = ()
    model: str | None = None
    revision: str | None = None
    base_url: str | None = Field(None, pattern=r"^https?://[^\s]+$")
    key_variable: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    timeout_s: float = Field(60.0, gt=0, le=3600)
    attempts: int = Field(3, ge=1, le=10)
    concurrency: int = Field(8, ge=1, le=256)
    tries: int = Field(3, ge=1, le=100, description="refreshes that may make a call which fails for a passing reason")
    num_gpus: float = Field(0.0, ge=0)
    batch_images: int = Field(8, ge=1)

    @model_validator(mode="after")
    def _fits_its_backend(self) -> CaptionBackend:
        needed = {"scene": (), "transformers": ("model", "styles"), "endpoint": ("model", "base_url", "styles")}[self.backend]
        missing = [name for name in needed if not getattr(self, name)]
        if missing:
            raise ValueError(f"the captions backend {self.backend!r} also needs {' and '.join(missing)}")
        foreign = {"scene": ("model", "revision", "base_url"), "transformers": ("base_url",), "endpoint": ("revision",)}[self.backend]
        given = [name for name in foreign if getattr(self, name) is not None]
        if given:
            raise ValueError(f"the captions backend {self.backend!r} has no {' or '.join(given)}: take it out, or choose another backend")
        return self

    def name(self) -> str:
        """What its captions are signed with."""
        return "scene-reader" if self.model is None else self.model if self.backend == "endpoint" else Path(self.model).name


class EmbedSettings(StrictSettings):
    """A CLIP- or SigLIP-class model, as a folder or hub id with its revision; null: nothing is embedded."""

    EXEC_FIELDS: ClassVar[frozenset[str]] = frozenset({"num_gpus", "batch_images"})

    model: str | None = None
    revision: str | None = None
    num_gpus: float = Field(0.0, ge=0)
    batch_images: int = Field(16, ge=1)


class SafetySettings(StrictSettings):
    """What to look for in every image. `nsfw` needs the extra of that name; `watermark` is the folder of an image classifier
    that has a label with 'watermark' in it."""

    nsfw: bool = False
    faces: bool = False
    watermark: str | None = None


class TextSettings(StrictSettings):
    """Reading words in images; `ocr` needs the extra of that name."""

    ocr: bool = False


class RefreshSettings(StrictSettings):
    """Everything the refresh needs. `executor` and `workers` say where it runs and never change a byte of the result."""

    EXEC_FIELDS: ClassVar[frozenset[str]] = frozenset({"executor", "workers"})

    scenes: ScenesSettings = ScenesSettings()
    photos: PhotosSettings = PhotosSettings()
    extra_sources: tuple[ExtraSource, ...] = ()
    ingest: IngestSettings = IngestSettings()
    policy: PolicySettings = PolicySettings()
    captions: tuple[CaptionBackend, ...] = (CaptionBackend(),)
    embed: EmbedSettings = EmbedSettings()
    safety: SafetySettings = SafetySettings()
    text: TextSettings = TextSettings()
    executor: Literal["local", "ray"] = "local"
    workers: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _caption_operators_differ(self) -> RefreshSettings:
        names = [(backend.name(), style) for backend in self.captions for style in backend.styles]
        twice = sorted({f"{name} ({style})" for name, style in names if names.count((name, style)) > 1})
        if twice:
            raise ValueError(f"refresh.captions asks twice for the captions of {', '.join(twice)}: name each model and style once")
        return self

    @model_validator(mode="after")
    def _rules_have_measures(self) -> RefreshSettings:
        needs = {
            "min_similarity": ("embed.model", self.embed.model),
            "max_nsfw": ("safety.nsfw", self.safety.nsfw),
            "max_face_fraction": ("safety.faces", self.safety.faces),
            "max_watermark": ("safety.watermark", self.safety.watermark),
            "max_text_fraction": ("text.ocr", self.text.ocr),
        }
        for rule, (measure, given) in needs.items():
            if getattr(self.policy, rule) is not None and not given:
                raise ValueError(f"refresh.policy.{rule} decides by what refresh.{measure} measures, which is off: set it, or leave the rule out")
        return self
