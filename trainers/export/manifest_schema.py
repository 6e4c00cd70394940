"""The manifest's fields and their types, strictly: what an export must write and what `verify` refuses to miss.
Its JSON schema travels in every bundle, for readers in other languages."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SHA256 = Field(pattern="^[0-9a-f]{64}$")


class Entry(BaseModel):
    """Base of all: unknown fields are refused, so that a misspelt one is found."""

    model_config = ConfigDict(extra="forbid", strict=True)


class File(Entry):
    """Size in bytes and hash of one file."""

    bytes: int = Field(ge=0)
    sha256: str = SHA256


class Port(Entry):
    """One input or output; 'batch' stands for the free axis, every other size is fixed."""

    dtype: str
    shape: list[int | Literal["batch"]]


class Graph(Entry):
    """What a part takes and gives, the same in every variant."""

    inputs: dict[str, Port]
    outputs: dict[str, Port]


class VariantFiles(Entry):
    """File of each part, and the ONNX Runtime session options that it must be run with."""

    files: dict[str, str]
    session_options: dict[str, str]


class Size(Entry):
    """Pixels."""

    width: int = Field(gt=0)
    height: int = Field(gt=0)


class Latent(Size):
    """One panel in latent cells."""

    channels: int = Field(gt=0)


class Shapes(Entry):
    """The static sizes; `max_batch` is how many rows one call may have."""

    image: Size
    latent: Latent
    sequence_tokens: int = Field(gt=0)
    max_batch: int = Field(gt=0)


class Sampler(Entry):
    """The loop: rules in words, the scheduler's constants, and the sigmas that follow from them, ending in 0."""

    rule: str
    condition: str
    time_ids: str
    noise: str
    steps: int = Field(gt=0)
    sequence_length: int
    scheduler: dict[str, Any]
    sigmas: list[float]


class Prompts(Entry):
    """Strings that checkpoints depend on byte for byte, and how many tokens of each template are dropped."""

    generate_template: str
    generate_prompt: str
    generate_drop_tokens: int
    edit_template: str
    edit_prompt: str
    edit_drop_tokens: int
    image_token: str


class Difference(Entry):
    """Against torch in float32."""

    max_abs: float
    psnr_db: float


class EncoderWeights(Entry):
    """The encoder's own weights, where it is no graph: how they are packed, and what of states and latents comes out of them."""

    folder: str
    format: Literal["MLX affine"]
    bits: int
    group_values: int
    layers: int
    values: int
    bytes: int
    states: dict[str, Difference]
    latents: dict[str, Difference]


class Encoder(Entry):
    """The text encoder's contract: a named part, exported here or brought along."""

    name: str
    width: int
    hidden_state: Literal["pre_norm", "post_norm"]
    pad_token_id: int
    digest: str
    exported: bool
    mask: str
    padding: str
    weights: EncoderWeights | None = None


class Vision(Entry):
    """How the encoder sees a source image: sizes in px, tokens in the prompt, normalisation inside the graph."""

    resize_px: int
    grid_px: list[int] = Field(min_length=2, max_length=2)
    tokens: int
    mean: list[float]
    std: list[float]


class Vae(Entry):
    """Range of pixels, and what latents are scaled and shifted by inside the decoder."""

    image_range: list[float] = Field(min_length=2, max_length=2)
    scaling_factor: float
    shift_factor: float


class Parity(Entry):
    """Of each graph alone, of latents and of images from text on; keys end in the variant."""

    note: str
    rows: int
    graphs: dict[str, Difference]
    end_to_end: dict[str, Difference]
    images: dict[str, Difference]


class Licences(Entry):
    """Of code and weights; `derived_from_release`: the weights inherit the release's terms."""

    code: str
    weights: str
    derived_from_release: bool
    non_commercial: bool


class Manifest(Entry):
    """manifest.json."""

    schema_version: int
    artifact_id: str = Field(pattern="^[0-9a-f]{16}$")
    checkpoint_digest: str = SHA256
    lineage: dict[str, Any]
    settings: dict[str, Any]
    graphs: dict[str, Graph]
    variants: dict[str, VariantFiles]
    shapes: Shapes
    sampler: Sampler
    prompts: Prompts
    encoder: Encoder
    vision: Vision
    vae: Vae
    quantization: dict[str, Any] | None
    targets: dict[str, Any] = Field(default_factory=dict)
    parity: Parity
    licences: Licences
    versions: dict[str, str]
    machine: dict[str, Any]
    verified_runtime: dict[str, str]
    files: dict[str, File]
    sizes: dict[str, int]


def manifest_schema() -> str:
    """JSON schema of manifest.json, as text."""
    return json.dumps(Manifest.model_json_schema(), indent=2, sort_keys=True) + "\n"
