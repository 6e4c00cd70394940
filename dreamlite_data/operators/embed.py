"""Embed images and captions with a CLIP- or SigLIP-class model of transformers, and compare each caption with its image.
One model gives both, for a cosine between two models means nothing."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from dreamlite_data import schema
from dreamlite_data.inference import worker_threads

CLIP_SCORE_SCALE = 100.0
"""A CLIP score is the cosine times 100 (as SANA and torchmetrics count it; Hessel et al. 2021 use 2.5 with zero as floor)."""


class Encoder:
    """A two-tower model from a folder or the hub. Vectors are float32 [N, D] of length 1.

    On a CPU each input passes alone, so that a row's last bit does not depend on its neighbours; on a GPU in batches.
    """

    def __init__(self, model: str, revision: str | None, batch: int) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.batch = batch if self.device == "cuda" else 1
        network = AutoModel.from_pretrained(model, revision=revision, dtype=torch.float32, use_safetensors=True)
        if not hasattr(network, "get_image_features") or not hasattr(network, "get_text_features"):
            raise ValueError(f"refresh.embed.model: {model} is a {type(network).__name__}, which has no image and text tower; give a CLIP or SigLIP model")
        self.network = network.to(self.device).eval()
        # PIL on every machine: torchvision resizes otherwise, and the vectors would depend on what is installed.
        self.processor = AutoImageProcessor.from_pretrained(model, revision=revision, backend="pil")
        self.tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
        text = network.config.text_config
        # SigLIP was trained on padded text and has no mask, so padding is part of the input; CLIP's mask hides it.
        self.text_options = {"padding": "max_length", "truncation": True, "max_length": text.max_position_embeddings, "return_tensors": "pt"}

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """RGB images to vectors."""
        return self._vectors(images, lambda part: self.network.get_image_features(**self._to(self.processor(images=part, return_tensors="pt"))))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts to vectors; what does not fit the text tower is cut off."""
        return self._vectors(texts, lambda part: self.network.get_text_features(**self._to(self.tokenizer(part, **self.text_options))))

    def _to(self, inputs: Any) -> Any:
        return {name: value.to(self.device) for name, value in inputs.items() if name != "token_type_ids"}

    def _vectors(self, items: Sequence[Any], forward: Any) -> np.ndarray:
        import torch

        found = []
        with torch.inference_mode():
            for start in range(0, len(items), self.batch):
                features = forward(list(items[start : start + self.batch])).pooler_output
                found.append(torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy())
        return np.concatenate(found)


@functools.cache
def encoder(model: str, revision: str | None, batch: int) -> Encoder:
    """The model, loaded once per process."""
    return Encoder(model, revision, batch)


class Tower:
    """What the operators of one model share: how it is named in every key, how it runs, and the shape of their rows."""

    schema: pa.Schema

    def __init__(self, model: str, weights: str, revision: str | None = None, batch: int = 16, num_gpus: float = 0.0) -> None:
        """`weights` is the digest that names the model in every key; `batch` and `num_gpus` say how it runs."""
        self.model, self.weights, self.revision, self.batch = model, weights, revision, batch
        self.resources = {"num_cpus": 1.0} | ({"num_gpus": num_gpus} if num_gpus else {})

    def config(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def encoder(self) -> Encoder:
        return encoder(self.model, self.revision, self.batch)

    def answer(self, subjects: pa.ChunkedArray, answers: Sequence[dict[str, Any]]) -> pa.Table:
        """`answers` as rows of the operator's table, one for each of `subjects`."""
        named = {"model": Path(self.model).name}
        return pa.Table.from_pylist(
            [{"subject_id": subject, **named, **answer} for subject, answer in zip(subjects.to_pylist(), answers, strict=True)],
            schema=self.schema,
        )


class Embed(Tower):
    """Operator over stored images: `vector` is the image's embedding."""

    name = "embed"
    version = 1
    reads = ("image_id", "bytes")
    table = "op_embed"
    schema = schema.OPERATORS["op_embed"]

    def __call__(self, rows: pa.Table) -> pa.Table:
        images = list(_opened(rows["bytes"].to_pylist()))
        good = [index for index, image in enumerate(images) if isinstance(image, Image.Image)]
        answers: list[dict[str, Any]] = [{"error": image} if isinstance(image, str) else {} for image in images]
        if good:
            with worker_threads():
                vectors = self.encoder().images([images[index] for index in good])
            for index, vector in zip(good, vectors, strict=True):
                answers[index] = _checked(vector)
        return self.answer(rows["image_id"], answers)


def _opened(payloads: Sequence[bytes]) -> Iterator[Image.Image | str]:
    for payload in payloads:
        try:
            yield Image.open(io.BytesIO(payload)).convert("RGB")
        except Exception as error:  # the contract: a bad row is a result
            yield f"{type(error).__name__}: {error}"[:500]


def _checked(vector: np.ndarray) -> dict[str, Any]:
    if not np.isfinite(vector).all():
        return {"error": "the model gave a vector that is not finite"}
    return {"vector": vector.tolist()}


class Similarity(Tower):
    """Operator over captions and the vectors that Embed, with the same model, gave their images."""

    name = "similarity"
    version = 1
    reads = ("caption_id", "text", "vector")
    table = "op_similarity"
    schema = schema.OPERATORS["op_similarity"]

    def __call__(self, rows: pa.Table) -> pa.Table:
        texts, vectors = rows["text"].to_pylist(), rows["vector"].to_pylist()
        answers: list[dict[str, Any]] = [{"error": "its image has no embedding"} if vector is None else {} for vector in vectors]
        good = [index for index, vector in enumerate(vectors) if vector is not None]
        if good:
            with worker_threads():
                written = self.encoder().texts([texts[index] for index in good])
            for index, words in zip(good, written, strict=True):
                cosine = float(np.dot(words.astype(np.float64), np.asarray(vectors[index], dtype=np.float64)))
                answers[index] = (
                    {"similarity": cosine, "clip_score": CLIP_SCORE_SCALE * cosine}
                    if np.isfinite(cosine) else {"error": "the model gave a vector that is not finite"}
                )  # fmt: skip
        return self.answer(rows["caption_id"], answers)
