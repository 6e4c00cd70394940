"""Vectors and similarities are those of transformers itself, do not depend on the neighbours, and a bad row is a row."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dreamlite_data.operators.base import op_version
from dreamlite_data.operators.embed import Embed, Similarity
from dreamlite_data.sources.base import DigestCache
from dreamlite_data.weights import WeightsError, weights_digest
from tests.dreamlite_data.operators.tiny_towers import tiny_clip, tiny_siglip

TEXTS = ["a large red circle", "a small blue square on the background", "photo", "a " + "red circle and " * 30]


@pytest.fixture(scope="module", params=[tiny_clip, tiny_siglip], ids=["clip", "siglip"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(request.param(tmp_path_factory.mktemp("towers") / "tiny"))


def pictures(count: int = 4) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (40 + 7 * index, 60, 3), dtype=np.uint8)) for index in range(count)]


def rows_of(images: list[Image.Image]) -> pa.Table:
    payloads = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        payloads.append(buffer.getvalue())
    return pa.table({"image_id": [hashlib.sha256(payload).hexdigest() for payload in payloads], "bytes": pa.array(payloads, pa.binary())})


def captioned(vectors: pa.ChunkedArray) -> pa.Table:
    return pa.table({"caption_id": [str(index) for index in range(len(TEXTS))], "text": TEXTS, "vector": vectors})


def direct(model: str, images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """Image vectors and cosines as transformers gives them, all in one batch."""
    import torch
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    network = AutoModel.from_pretrained(model).eval()
    padding = {"padding": True} if network.config.model_type == "clip" else {"padding": "max_length"}
    words = AutoTokenizer.from_pretrained(model)(TEXTS, truncation=True, max_length=24, return_tensors="pt", **padding)
    words.pop("token_type_ids", None)
    pixels = AutoImageProcessor.from_pretrained(model, backend="pil")(images=images, return_tensors="pt")
    with torch.no_grad():
        answer = network(**words, **pixels)
    return answer.image_embeds.numpy(), (answer.text_embeds * answer.image_embeds).sum(-1).numpy()


def test_vectors_and_cosines_are_those_of_transformers(model: str) -> None:
    images = pictures()
    wanted_vectors, wanted_cosines = direct(model, images)
    embedded = Embed(model, "w")(rows_of(images))
    vectors = np.array(embedded["vector"].to_pylist())
    assert embedded["error"].null_count == len(images)
    np.testing.assert_allclose(vectors, wanted_vectors, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    compared = Similarity(model, "w")(captioned(embedded["vector"]))
    np.testing.assert_allclose(compared["similarity"].to_pylist(), wanted_cosines, atol=1e-6)
    np.testing.assert_allclose(compared["clip_score"].to_pylist(), 100 * wanted_cosines, atol=1e-4)
    assert np.abs(np.subtract.outer(wanted_cosines, wanted_cosines)).max() > 1e-3  # they differ, so this says something


def test_a_row_does_not_depend_on_its_neighbours(model: str) -> None:
    rows = rows_of(pictures())
    together = Embed(model, "w")(rows)
    alone = pa.concat_tables([Embed(model, "w")(rows.slice(index, 1)) for index in range(len(rows))])
    assert together.equals(alone)
    compared = Similarity(model, "w")(captioned(together["vector"]))
    backwards = Similarity(model, "w")(captioned(together["vector"]).take([3, 2, 1, 0])).take([3, 2, 1, 0])
    assert compared.equals(backwards)


def test_a_bad_image_is_a_row_with_its_reason_and_its_caption_has_no_similarity(model: str) -> None:
    rows = rows_of(pictures(2))
    rows = pa.concat_tables([rows, pa.table({"image_id": ["broken"], "bytes": pa.array([b"no image"], pa.binary())})])
    embedded = Embed(model, "w")(rows)
    assert embedded["subject_id"].to_pylist() == rows["image_id"].to_pylist()
    assert [error is None for error in embedded["error"].to_pylist()] == [True, True, False]
    texts = pa.table({"caption_id": ["a", "b", "c"], "text": TEXTS[:3], "vector": embedded["vector"]})
    assert Similarity(model, "w")(texts)["error"].to_pylist() == [None, None, "its image has no embedding"]


def test_other_weights_are_another_version(tmp_path: Path) -> None:
    digests = DigestCache(tmp_path / "digests.json")
    names = [weights_digest(str(tiny_clip(tmp_path / str(seed), seed)), None, digests, "refresh.embed.model") for seed in (0, 1)]
    assert len({op_version(Embed("any", name)) for name in names}) == 2
    assert weights_digest(str(tmp_path / "0"), None, digests, "refresh.embed.model") == names[0]
    moved = (tmp_path / "0").rename(tmp_path / "elsewhere")
    assert weights_digest(str(moved), None, digests, "refresh.embed.model") == names[0]


def test_weights_that_are_not_there_or_not_pinned_are_said_plainly(tmp_path: Path) -> None:
    digests = DigestCache(tmp_path / "digests.json")
    with pytest.raises(WeightsError, match="refresh.embed.model: there is no folder /nowhere/clip"):
        weights_digest("/nowhere/clip", None, digests, "refresh.embed.model")
    with pytest.raises(WeightsError, match="also set its revision"):
        weights_digest("openai/clip", None, digests, "refresh.embed.model")
    assert weights_digest("openai/clip", "abc", digests, "refresh.embed.model") == "openai/clip@abc"
