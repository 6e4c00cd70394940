"""Settings of the models that look at images, words and edits: where each lies, on what it runs, what it is asked for.
They stand in the settings of a refresh, and each is off where it is not set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from dreamlite_data.strict_settings import StrictSettings


def _whole_above_one(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("a model takes a part of one GPU (0.5), or whole ones")
    return value


GpuShare = Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)]
"""GPUs of each worker that runs a model. With 0 it runs on the CPU; under Ray it then sees no GPU, wherever it runs."""


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
