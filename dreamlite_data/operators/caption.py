"""Read the small world's scenes out of stored images: a second opinion, and with it the means to check the provider's words.
Also the interface of a captioner, whatever stands behind it; `describe` applies those."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from dreamlite_data import scenes, schema
from dreamlite_data.images import decode_stored
from dreamlite_data.operators.base import by_row
from dreamlite_data.operators.ingest import caption_id
from dreamlite_data.scenes.language import object_phrase


@dataclasses.dataclass(frozen=True)
class Described:
    """A captioner's answer: `text` is None with a `reason` where it has nothing to say and with an `error` where it failed
    (`retry`: a later run may succeed); `scene_json` and `residual` where it knows the structure."""

    text: str | None = None
    reason: str | None = None
    scene_json: str | None = None
    residual: float | None = None
    error: str | None = None
    retry: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """A stored image: `payload` is its encoded bytes (clean RGB), `image_id` their sha256."""

    image_id: str
    payload: bytes


class Captioner(Protocol):
    """Puts pictures into words. `name` is stored with every caption it writes; `digest` names its weights."""

    name: str
    digest: str

    def describe(self, pictures: Sequence[Picture], style: str) -> list[Described]:
        """One answer per picture, in order. Any choice is seeded by the picture's id, so that an image keeps its words."""
        ...


class SceneCaptioner:
    """Reads the scene out of the pixels and puts it into words: exact for the small world, silent on anything else.
    The style 'scene' is a caption of the small world's own language in one of its forms."""

    name = "scene-reader"
    digest = "none"

    def describe(self, pictures: Sequence[Picture], style: str) -> list[Described]:
        """As in Captioner; raises on bytes that are no image."""
        return [self._one(picture, style) for picture in pictures]

    def _one(self, picture: Picture, style: str) -> Described:
        pixels = decode_stored(picture.payload)
        if pixels.shape[:2] != (64, 64):
            return Described(reason=f"not a scene of 64 x 64 px but {pixels.shape[1]} x {pixels.shape[0]} px")
        reading = scenes.read_scene(pixels)
        residual = float(reading.residual) if np.isfinite(reading.residual) else None
        if reading.scene is None:
            return Described(reason=reading.reason, residual=residual)
        return Described(scene_words(reading.scene, style, picture.image_id), None, reading.scene.to_json(), residual)


def scene_words(scene: scenes.Scene, style: str, image_id: str) -> str:
    """`scene` in the words of a style: 'scene' (a form drawn by the id), 'tag', 'short', 'medium' (the first form) or 'dense'."""
    things = [f"{item.colour} {item.shape}" for item in scene.objects]
    if style == "scene":
        return scenes.caption(scene, np.random.default_rng(int(image_id[:16], 16)))
    if style == "tag":
        return ", ".join([*things, f"{scene.style} {scene.background} background"])
    if style == "short":
        phrases = [f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}" for thing in things]
        return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    if style == "medium":
        return scenes.caption(scene)
    if style == "dense":
        count = {1: "one shape", 2: "two shapes", 3: "three shapes"}[len(scene.objects)]
        listing = "; ".join(object_phrase(item) for item in scene.objects)
        return f"A drawing of {count} on a {scene.style} {scene.background} background: {listing}."
    raise ValueError(f"there is no caption style {style!r}")


class Caption:
    """Operator over stored images; its captions go to `captions`, its reading of the image to `op_caption`."""

    name = "caption"
    version = 1
    style = "scene"
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
        [answer] = self.captioner.describe([Picture(row["image_id"], row["bytes"])], self.style)
        identity = caption_id(row["image_id"], self.style, answer.text) if answer.text else None
        return {
            "caption_id": identity, "text": answer.text, "scene_json": answer.scene_json, "residual": answer.residual,
            "reason": answer.reason, "error": answer.error,
        }  # fmt: skip

    def side_tables(self, rows: pa.Table, answer: pa.Table) -> dict[str, pa.Table]:
        """Rows for `captions`: one for each image that was described."""
        found = [
            {"caption_id": row["caption_id"], "image_id": row["subject_id"], "style": self.style, "text": row["text"],
             "captioner": self.captioner.name}
            for row in answer.to_pylist()
            if row["text"]
        ]  # fmt: skip
        return {"captions": schema.rows_table("captions", found)}
