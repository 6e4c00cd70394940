"""Settings of the data refresh: which sources, how many rows, which thresholds, on which executor.
Every group refuses unknown keys and says which key was probably meant."""

from __future__ import annotations

import difflib
import ipaddress
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

if TYPE_CHECKING:
    from dreamlite_data.quotas import Quotas


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


def _whole_above_one(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("a model takes a part of one GPU (0.5), or whole ones")
    return value


GpuShare = Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)]
"""GPUs of each worker that runs a model. With 0 it runs on the CPU; under Ray it then sees no GPU, wherever it runs."""


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


class ChatSettings(StrictSettings):
    """A model that answers questions about pictures. `transformers` takes `model` as a folder or hub id (with `revision`),
    `endpoint` as the name that the OpenAI-compatible server at `base_url` serves; its key comes from the environment variable
    `key_variable`. What it answered is kept, so that no question is paid for twice."""

    EXEC_FIELDS: ClassVar[frozenset[str]] = frozenset(
        {"base_url", "key_variable", "timeout_s", "attempts", "concurrency", "tries", "num_gpus", "batch_images"}
    )
    NEEDS: ClassVar[dict[str, tuple[str, ...]]] = {"transformers": ("model",), "endpoint": ("model", "base_url")}
    FOREIGN: ClassVar[dict[str, tuple[str, ...]]] = {"transformers": ("base_url",), "endpoint": ("revision",)}

    backend: Literal["transformers", "endpoint"] = "transformers"
    model: str | None = None
    revision: str | None = None
    base_url: str | None = Field(None, pattern=r"^https?://[^\s]+$")
    key_variable: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    timeout_s: float = Field(60.0, gt=0, le=3600)
    attempts: int = Field(3, ge=1, le=10)
    concurrency: int = Field(8, ge=1, le=256)
    tries: int = Field(3, ge=1, le=100, description="refreshes that may make a call which fails for a passing reason")
    num_gpus: GpuShare = 0.0
    batch_images: int = Field(8, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _from_folder(cls, values: Any) -> Any:
        """A path alone is a model of transformers that lies there."""
        return {"backend": "transformers", "model": str(values)} if isinstance(values, (str, Path)) else values

    @model_validator(mode="after")
    def _fits_its_backend(self) -> ChatSettings:
        missing = [name for name in self.NEEDS[self.backend] if not getattr(self, name)]
        if missing:
            raise ValueError(f"the {self._called} {self.backend!r} also needs {' and '.join(missing)}")
        given = [name for name in self.FOREIGN[self.backend] if getattr(self, name) is not None]
        if given:
            raise ValueError(f"the {self._called} {self.backend!r} has no {' or '.join(given)}: take it out, or choose another backend")
        return self

    _called: ClassVar[str] = "chat backend"

    def name(self) -> str:
        """What its answers are signed with."""
        return str(self.model) if self.backend == "endpoint" else Path(str(self.model)).name


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


CaptionStyle = Literal["tag", "short", "medium", "dense"]


class CaptionBackend(ChatSettings):
    """Who writes captions, in which styles: a chat model, or the scene reader, which reads every image anyway, for verification,
    and with styles also writes them."""

    NEEDS: ClassVar[dict[str, tuple[str, ...]]] = {
        "scene": (), "transformers": ("model", "styles"), "endpoint": ("model", "base_url", "styles"),
    }  # fmt: skip
    FOREIGN: ClassVar[dict[str, tuple[str, ...]]] = {**ChatSettings.FOREIGN, "scene": ("model", "revision", "base_url")}
    _called: ClassVar[str] = "captions backend"

    backend: Literal["scene", "transformers", "endpoint"] = "scene"
    styles: tuple[CaptionStyle, ...] = ()

    def name(self) -> str:
        """What its captions are signed with."""
        return "scene-reader" if self.model is None else super().name()


class EmbedSettings(StrictSettings):
    """A CLIP- or SigLIP-class model, as a folder or hub id with its revision; null: nothing is embedded."""

    EXEC_FIELDS: ClassVar[frozenset[str]] = frozenset({"num_gpus", "batch_images"})

    model: str | None = None
    revision: str | None = None
    num_gpus: GpuShare = 0.0
    batch_images: int = Field(16, ge=1)


class JudgeSettings(ChatSettings):
    """A chat model that says of an edit whether it was done, where a rule of verify_rules.yaml wants to know. `max_new_tokens`
    bounds its answer: a word, or the thoughts of a reasoning model and a word."""

    max_new_tokens: int = Field(16, ge=4, le=8192)


class SafetySettings(StrictSettings):
    """What to look for in every image. `nsfw` needs the extra of that name; `watermark` is the folder of an image classifier
    that has a label with 'watermark' in it."""

    nsfw: bool = False
    faces: bool = False
    watermark: str | None = None


class TextSettings(StrictSettings):
    """Reading words in images; `ocr` needs the extra of that name."""

    ocr: bool = False


FurtherKind = Literal["clip", "pickscore", "hpsv2", "imagereward", "aesthetic"]


class FurtherScorer(StrictSettings):
    """A scorer beside the reward of a task, from a local folder `model`: 'clip' (CLIP score), 'pickscore' and 'hpsv2' (CLIP
    ViT-H class), 'imagereward' (BLIP class), 'aesthetic' (an image tower and a small head, which reads no text)."""

    kind: FurtherKind
    model: Path
    tasks: tuple[Literal["generate", "edit"], ...] = Field(("generate",), min_length=1)

    @model_validator(mode="after")
    def _reads_what_is_there(self) -> FurtherScorer:
        if "edit" in self.tasks and self.kind != "aesthetic":
            raise ValueError(
                f"the scorer {self.kind!r} compares an image with its caption, which an edit has not: for tasks with 'edit' take 'aesthetic'"
            )
        return self


class ScoringSettings(StrictSettings):
    """How rows are scored, and by which further scorers. `num_gpus` above 0 makes one actor per such share of the cluster's GPUs
    (executor ray), fed by CPU workers. `batch_tokens` bounds a batch with its padding. `dtype` is the backbone's; heads stay float32."""

    EXEC_FIELDS: ClassVar[frozenset[str]] = frozenset({"num_gpus", "batch_tokens"})

    num_gpus: float = Field(0.0, ge=0)
    batch_tokens: int = Field(8_192, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    further: tuple[FurtherScorer, ...] = ()

    @model_validator(mode="after")
    def _one_of_each_kind(self) -> ScoringSettings:
        named = [(scorer.kind, task) for scorer in self.further for task in scorer.tasks]
        twice = sorted({f"{kind} ({task})" for kind, task in named if named.count((kind, task)) > 1})
        if twice:
            raise ValueError(f"refresh.scoring.further asks twice for {', '.join(twice)}: name each kind once for a task")
        return self


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
