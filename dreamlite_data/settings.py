"""Settings of the data refresh: which sources, how many rows, which thresholds, on which executor.
Those of the models in it stand in `model_settings`."""

from __future__ import annotations

import difflib
import ipaddress
import re
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from dreamlite_data.model_settings import (
    CaptionBackend,
    ChatSettings,
    EmbedSettings,
    JudgeSettings,
    SafetySettings,
    ScoringSettings,
    TextSettings,
)
from dreamlite_data.strict_settings import StrictSettings

if TYPE_CHECKING:
    from dreamlite_data.quotas import Quotas

PHOTOS = "photos"


class ScenesSettings(StrictSettings):
    """The small world as a source. `fault_share` of the rows is broken on purpose, so that filters can be graded."""

    t2i_rows: int = Field(8000, ge=0)
    edit_rows: int = Field(8000, ge=0)
    fault_share: float = Field(0.08, ge=0, le=0.5)
    seed: int = 0
    shard_rows: int = Field(1000, ge=1)


class PhotosSettings(StrictSettings):
    """Photos out of the scikit-image and scikit-learn wheels, resized to `max_px` on the longer side.
    `edits_per_image` exact edits (exposure, blur, ...) are made from each; `inverse_edits` adds the way back where it is exact."""

    enabled: bool = True
    max_px: int = Field(256, ge=64)
    edits_per_image: int = Field(3, ge=0)
    inverse_edits: bool = False


class CompositeSettings(StrictSettings):
    """Edits made by pasting cut-outs onto photos: `per_image` of each photo (0: none), with the way back. `cutouts` is a folder of
    PNG files with alpha and .txt captions, under the `licence` and from the `origin` given here or in a .json beside each; without
    it shapes are drawn."""

    cutouts: Path | None = None
    licence: str | None = None
    origin: str | None = None
    per_image: int = Field(0, ge=0, le=7)
    inverse: bool = True

    @model_validator(mode="after")
    def _says_it_of_a_folder(self) -> CompositeSettings:
        if self.cutouts is None and (self.licence or self.origin):
            raise ValueError("refresh.composite.licence and origin are of a folder of cut-outs: give cutouts too, or leave them out")
        return self


class EditModelSettings(StrictSettings):
    """Edits of photos by models, off without `editor`: `instructor` proposes instructions (a folder with a transformers
    image-text-to-text model, or a chat model as in ChatSettings), `editor` is a folder with a diffusers editing pipeline. Of `tries`
    pictures the one that the edit reward in `reward` likes best is kept if it reaches `min_reward`; the others stay as negatives.
    Every picture made is kept until `picture_cache_mb` are full, the least used go first, so that none is paid for twice."""

    EXEC_FIELDS: ClassVar[frozenset[str]] = frozenset({"picture_cache_mb"})

    instructor: ChatSettings | None = None
    editor: Path | None = None
    reward: Path | None = None
    per_image: int = Field(1, ge=1)
    tries: int = Field(3, ge=1, le=64)
    min_reward: float | None = None
    inference_steps: int = Field(28, ge=1)
    max_new_tokens: int = Field(256, ge=8, le=4096)
    device: str = "cpu"
    picture_cache_mb: int = Field(4096, ge=1)

    @model_validator(mode="after")
    def _whole_or_off(self) -> EditModelSettings:
        if self.editor is not None and self.instructor is None:
            raise ValueError("refresh.edit_model.editor needs an instructor that says what to edit: give the folder of an image-text-to-text model, or an endpoint")
        if self.editor is not None and self.tries > 1 and self.reward is None:
            raise ValueError("refresh.edit_model.tries above 1 needs a reward that chooses: give the folder of an EditReward, or set tries to 1")
        if self.min_reward is not None and self.reward is None:
            raise ValueError("refresh.edit_model.min_reward needs a reward: give the folder of an EditReward, or leave min_reward out")
        return self


class EditPairsSettings(StrictSettings):
    """More triplets from verified ones of the small world, where its language can say them: the way back (`inverse`), and two
    steps in one (`composed`: A to B and B to C give A to C)."""

    inverse: bool = False
    composed: bool = False


class QuotaSettings(StrictSettings):
    """How much of each edit type is wanted: the shares of a packaged `mix`, or `shares` of one's own over types of the taxonomy ("object",
    or "object/add"), which sum to 1. `steer` aims the draws of edits of photos at them; `cap` keeps, when a dataset version is made, of each
    type no more than its share of `cap_rows` (null: of the rows that pass every rule)."""

    mix: str = "dreamlite"
    shares: dict[str, float] = Field(default_factory=dict)
    steer: bool = False
    cap: bool = False
    cap_rows: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _can_be_read(self) -> QuotaSettings:
        if self.shares or self.mix != "dreamlite":
            self.read()
        if self.shares and self.mix != "dreamlite":
            raise ValueError("refresh.quotas has both a mix and shares of its own: leave one of them out")
        return self

    def read(self) -> Quotas:
        """The quotas that are meant. Raises QuotaError."""
        from dreamlite_data.quotas import read_quotas

        return read_quotas(self.shares or self.mix)


class DownloadSettings(StrictSettings):
    """How URL lists are fetched: limits per file, politeness per host, what is never fetched, and how often failures are retried."""

    max_file_mb: int = Field(32, ge=1)
    timeout_s: float = Field(30.0, gt=0)
    """For one file from its first byte sent to its last byte received, redirects included."""
    max_redirects: int = Field(5, ge=0)
    connections: int = Field(64, ge=1)
    connections_per_host: int = Field(2, ge=1)
    host_interval_s: float = Field(0.1, ge=0)
    """Least time between the starts of two requests to one host."""
    tries_per_run: int = Field(2, ge=1)
    max_tries: int = Field(6, ge=1)
    """A passing failure (a time-out, a 5xx, a lost connection) is asked again until this many tries; never after."""
    retry_pause_s: float = Field(5.0, ge=0)
    retry_permanent: bool = False
    """Ask again for what failed for good (a 404, an opt-out, a file over the limit) too."""
    opt_out: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """Directives of the X-Robots-Tag header under which a file is not kept."""
    private_networks: tuple[str, ...] = ()
    """Networks ("10.1.0.0/16") that may be reached although they are loopback, private, link-local or otherwise not of the internet."""
    user_agent: str = Field("dreamlite-pipeline", min_length=1)

    @field_validator("private_networks")
    @classmethod
    def _check_networks(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            ipaddress.ip_network(value)  # its message names the value and what is wrong with it
        return values


class ExtraSource(StrictSettings):
    """A source of the user's own. `kind` says how rows lie there: 'folder' (images with .txt sidecars), 'webdataset' (tar shards),
    'parquet', 'huggingface' (a hub id or a local folder), 'jsonl' (a table of image paths or URLs), 'sample_folders' (a folder per
    sample), 'url_list' (a list to download). `mapping` names what its columns mean: a packaged mapping, or a YAML file."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    kind: Literal["folder", "webdataset", "parquet", "huggingface", "jsonl", "sample_folders", "url_list"]
    path: Path
    """Folder or file; for 'huggingface' also a hub id (owner/name)."""
    licence: str | None = None
    origin: str | None = None
    mapping: str | None = None
    image_root: Path | None = None
    """Where image paths inside a table start; by default the folder of the table. Nothing outside is read."""
    limit_rows: int | None = Field(None, ge=1)
    rows_per_unit: int = Field(256, ge=1)
    """Rows that are read, withdrawn and read again together, where a file holds many."""
    unit_mb: int = Field(256, ge=1)
    """A Parquet file larger than this is read as several units of whole row groups, so that memory stays flat."""
    config: str | None = None
    split: str = "train"
    revision: str | None = None

    TAKES: ClassVar[dict[str, tuple[str, ...]]] = {
        "folder": (),
        "webdataset": ("mapping",),
        "parquet": ("mapping", "image_root", "limit_rows", "rows_per_unit", "unit_mb"),
        "huggingface": ("mapping", "image_root", "limit_rows", "rows_per_unit", "unit_mb", "config", "split", "revision"),
        "jsonl": ("mapping", "image_root", "limit_rows", "rows_per_unit"),
        "sample_folders": ("mapping", "limit_rows"),
        "url_list": ("limit_rows",),
    }
    """Which settings a kind of source takes besides name, kind, path, licence and origin."""

    @model_validator(mode="after")
    def _check_fit(self) -> ExtraSource:
        takes = self.TAKES[self.kind]
        unfit = sorted(self.model_fields_set - {"name", "kind", "path", "licence", "origin", *takes})
        unfit = [name for name in unfit if getattr(self, name) != type(self).model_fields[name].default]
        if unfit:
            kinds = [kind for kind, names in self.TAKES.items() if unfit[0] in names]
            raise ValueError(f"source {self.name!r} of kind {self.kind!r} takes no {unfit[0]}: that is for kind {' or '.join(kinds)}")
        if self.kind in ("jsonl", "sample_folders") and self.mapping is None:
            raise ValueError(f"source {self.name!r} of kind {self.kind!r} needs a mapping: name one, or give the path of a YAML file")
        return self


class IngestSettings(StrictSettings):
    """What may enter. Limits hold before any pixel is decoded, so that a decompression bomb costs nothing."""

    max_side_px: int = Field(16384, ge=64)
    max_image_px: int = Field(64_000_000, ge=4096)
    max_member_mb: int = Field(64, ge=1)
    folder_files_per_task: int = Field(1024, ge=1)
    folder_mb_per_task: int = Field(64, ge=1)
    """Files of a folder make one task until there are so many of them or they are so large together."""
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
    require_triplet_rules: bool = False
    """Whether triplets of sources must pass the rules of their edit type (verify_rules.yaml); composites always must."""
    sft_share: float = Field(0.35, gt=0, le=1)
    rl_rows_per_task: int = Field(4000, ge=1)
    heldout_share: float = Field(0.05, ge=0, lt=1)
    splits: dict[str, float] = Field(default_factory=dict)
    """Names and shares of the splits, instead of train and heldout: {train: 0.9, validation: 0.05, test: 0.05}."""
    min_similarity: float | None = Field(None, gt=0, le=1)
    max_nsfw: float | None = Field(None, gt=0, lt=1)
    max_face_fraction: float | None = Field(None, gt=0, lt=1)
    max_watermark: float | None = Field(None, gt=0, lt=1)
    max_text_fraction: float | None = Field(None, gt=0, lt=1)
    allow_unanimous: tuple[str, ...] = ()
    """Rules ("dataset.rule", or "*") that may pass or reject every row without that being an error."""

    @model_validator(mode="after")
    def _splits_are_whole(self) -> PolicySettings:
        if not self.splits:
            return self
        said = ", ".join(f"{name} {share:g}" for name, share in self.splits.items())
        wrong = [name for name in self.splits if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name)]
        if wrong:
            raise ValueError(f"refresh.policy.splits: a split cannot be called {wrong[0]!r}: lower-case letters, digits and underscores")
        if "train" not in self.splits or len(self.splits) < 2:
            near = difflib.get_close_matches("train", self.splits, n=1)
            hint = f"; did you mean 'train' by {near[0]!r}?" if near and near[0] != "train" else ""
            raise ValueError(f"refresh.policy.splits ({said}) needs 'train', which the stages learn from, and another to judge them on{hint}")
        if any(share <= 0 for share in self.splits.values()) or abs(sum(self.splits.values()) - 1) > 1e-6:
            raise ValueError(f"refresh.policy.splits ({said}) must be shares above 0 that sum to 1; they sum to {sum(self.splits.values()):g}")
        if self.heldout_share != type(self).model_fields["heldout_share"].default:
            raise ValueError("refresh.policy.splits names every split with its share: leave heldout_share out")
        return self

    def split_names(self) -> tuple[str, ...]:
        """The splits of every dataset version, in the order of the settings."""
        return tuple(self.splits) or ("train", "heldout")


ROUTE_NAMES = frozenset({"exact", "composite", "model", "scene_graph"})
OWN_SOURCES = re.compile(r"photos_\d+|scenes_.*")
"""Names of the rows that the edit routes make, and of the sources that come with the package."""


class RefreshSettings(StrictSettings):
    """Everything the refresh needs. `executor` and `workers` say where it runs and never change a byte of the result."""

    EXEC_FIELDS: ClassVar[frozenset[str]] = frozenset({"executor", "workers"})

    scenes: ScenesSettings = ScenesSettings()
    photos: PhotosSettings = PhotosSettings()
    composite: CompositeSettings = CompositeSettings()
    edit_model: EditModelSettings = EditModelSettings()
    edit_pairs: EditPairsSettings = EditPairsSettings()
    quotas: QuotaSettings = QuotaSettings()
    extra_sources: tuple[ExtraSource, ...] = ()
    edit_sources: tuple[str, ...] = (PHOTOS,)
    """Whose pictures the edit routes start from: 'photos', the packaged ones, and names of `extra_sources`. To take a name out again
    stops new edits; those that were made of its pictures stay."""
    downloads: DownloadSettings = DownloadSettings()
    ingest: IngestSettings = IngestSettings()
    semantic: SemanticSettings = SemanticSettings()
    benchmarks: tuple[Benchmark, ...] = ()
    policy: PolicySettings = PolicySettings()
    captions: tuple[CaptionBackend, ...] = (CaptionBackend(),)
    embed: EmbedSettings = EmbedSettings()
    safety: SafetySettings = SafetySettings()
    text: TextSettings = TextSettings()
    scoring: ScoringSettings = ScoringSettings()
    judge: JudgeSettings | None = None
    executor: Literal["local", "ray"] = "local"
    workers: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _source_names_differ(self) -> RefreshSettings:
        names = [source.name for source in self.extra_sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"refresh.extra_sources has two sources named {twice[0]!r}, and their rows would be taken for each other's: rename one")
        taken = next((name for name in names if name in ROUTE_NAMES or OWN_SOURCES.fullmatch(name)), None)
        if taken is not None:
            raise ValueError(f"refresh.extra_sources names a source {taken!r}, which is what rows of the pipeline's own are called: rename it")
        return self

    @model_validator(mode="after")
    def _caption_operators_differ(self) -> RefreshSettings:
        names = [(backend.name(), style) for backend in self.captions for style in backend.styles]
        twice = sorted({f"{name} ({style})" for name, style in names if names.count((name, style)) > 1})
        if twice:
            raise ValueError(f"refresh.captions asks twice for the captions of {', '.join(twice)}: name each model and style once")
        return self

    @model_validator(mode="after")
    def _ray_gives_out_the_gpus(self) -> RefreshSettings:
        if self.executor == "ray" and self.edit_model.device.startswith("cuda:"):
            raise ValueError(
                f"refresh.edit_model.device is {self.edit_model.device!r}, but with executor ray each worker is given its own GPU and sees no "
                "other: write 'cuda'"
            )
        return self

    @model_validator(mode="after")
    def _edit_sources_are_there(self) -> RefreshSettings:
        extra = [source.name for source in self.extra_sources]
        for name in self.edit_sources:
            if name not in (PHOTOS, *extra):
                near = difflib.get_close_matches(name, (PHOTOS, *extra), n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(map(repr, (PHOTOS, *extra)))}"
                raise ValueError(f"refresh.edit_sources names {name!r}, which is neither 'photos' nor one of refresh.extra_sources: {hint}")
        if PHOTOS in extra and "edit_sources" in self.model_fields_set:
            raise ValueError("refresh.edit_sources means the packaged photos by 'photos': give the source of refresh.extra_sources another name")
        return self

    @model_validator(mode="after")
    def _quotas_have_draws(self) -> RefreshSettings:
        drawn = self.photos.edits_per_image + self.composite.per_image + (self.edit_model.editor is not None)
        if self.quotas.steer and not drawn:
            raise ValueError(
                "refresh.quotas.steer has nothing to steer: set photos.edits_per_image, composite.per_image or edit_model.editor, or leave steer out"
            )
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
