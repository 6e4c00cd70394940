"""Write captions: the interface of a captioner, and the one that needs no weights because it reads the small world's scenes.
The provider's own words enter with ingest; this adds a second opinion, and with it the means to check the first."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from dreamlite_data import scenes, schema
from dreamlite_data.images import decode_stored
from dreamlite_data.operators.base import by_row
from dreamlite_data.operators.ingest import caption_id


@dataclasses.dataclass(frozen=True)
class Described:
    """A captioner's answer: `text` is None with a `reason` where it cannot say; `scene_json` where it knows the structure."""

    text: str | None
    reason: str | None = None
    scene_json: str | None = None
    residual: float | None = None


class Captioner(Protocol):
    """Describes images. `name` is stored with every caption it writes; `digest` names its weights."""

    name: str
    style: str
    digest: str

    def describe(self, pixels: np.ndarray, image_id: str) -> Described:
        """Caption for uint8 [H, W, 3]; the id seeds any choice, so that an image keeps its words."""
        ...


class SceneCaptioner:
    """Reads the scene out of the pixels and puts it into words: exact for the small world, silent on anything else."""

    name = "scene-reader"
    style = "scene"
    digest = "none"

    def describe(self, pixels: np.ndarray, image_id: str) -> Described:
        if pixels.shape[:2] != (64, 64):
            return Described(None, f"not a scene of 64 x 64 px but {pixels.shape[1]} x {pixels.shape[0]} px")
        reading = scenes.read_scene(pixels)
        residual = float(reading.residual) if np.isfinite(reading.residual) else None
        if reading.scene is None:
            return Described(None, reading.reason, None, residual)
        words = scenes.caption(reading.scene, np.random.default_rng(int(image_id[:16], 16)))
        return Described(words, None, reading.scene.to_json(), residual)


class Caption:
    """Operator over stored images; its captions go to `captions`, its reading of the image to `op_caption`."""

    name = "caption"
    version = 1
    reads = ("image_id", "bytes")
    table = "op_caption"
    resources = {"num_cpus": 1.0}
    schema = schema.OPERATORS["op_caption"]

    def __init__(self, captioner: Captioner | None = None) -> None:
        self.captioner = captioner or SceneCaptioner()

    def config(self) -> dict[str, Any]:
        return {"captioner": self.captioner.name, "weights": self.captioner.digest}

    def __call__(self, rows: pa.Table) -> pa.Table:
        return by_row(self._one, rows, "image_id", self.schema)

    def _one(self, row: dict[str, Any]) -> dict[str, Any]:
        answer = self.captioner.describe(decode_stored(row["bytes"]), row["image_id"])
        identity = caption_id(row["image_id"], self.captioner.style, answer.text) if answer.text else None
        return {
            "caption_id": identity, "text": answer.text, "scene_json": answer.scene_json, "residual": answer.residual,
            "reason": answer.reason,
        }  # fmt: skip

    def side_tables(self, rows: pa.Table, answer: pa.Table) -> dict[str, pa.Table]:
        """Rows for `captions`: one for each image that was described."""
        found = [
            {"caption_id": row["caption_id"], "image_id": row["subject_id"], "style": self.captioner.style, "text": row["text"],
             "captioner": self.captioner.name}
            for row in answer.to_pylist()
            if row["text"]
        ]  # fmt: skip
        return {"captions": schema.rows_table("captions", found)}
