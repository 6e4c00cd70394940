"""On real photos: the one face is found, a dressed astronaut is no nudity, and what was not asked for is null."""

from __future__ import annotations

import importlib
import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import skimage.data
from PIL import Image

from dreamlite_data.model_settings import SafetySettings
from dreamlite_data.operators import safety
from dreamlite_data.operators.base import op_version
from dreamlite_data.operators.safety import MissingExtra, Safety, covered_fraction, find_faces, require_extra

needs_nudenet = pytest.mark.skipif(find_spec("nudenet") is None, reason="the extra nsfw is not installed")


def rows_of(*images: np.ndarray) -> pa.Table:
    payloads = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        payloads.append(buffer.getvalue())
    return pa.table({"image_id": [str(index) for index in range(len(images))], "bytes": pa.array(payloads, pa.binary())})


def test_the_astronaut_has_one_face_and_coffee_has_none() -> None:
    [box] = find_faces(skimage.data.astronaut())
    top, left, height, width = box
    assert top < 120 < top + height and left < 225 < left + width  # the nose
    assert find_faces(skimage.data.coffee()) == []
    answer = Safety(SafetySettings(faces=True))(rows_of(skimage.data.astronaut(), skimage.data.coffee())).to_pylist()
    assert [row["faces"] for row in answer] == [1, 0]
    assert answer[0]["face_fraction"] == pytest.approx(height * width / 512**2) and answer[1]["face_fraction"] == 0
    assert all(row["nsfw"] is None and row["watermark"] is None and row["error"] is None for row in answer)


def test_a_large_image_is_searched_small_and_answered_in_its_own_pixels() -> None:
    large = np.asarray(Image.fromarray(skimage.data.astronaut()).resize((1536, 1536)))
    [box] = find_faces(large)
    [reference] = find_faces(skimage.data.astronaut())
    np.testing.assert_allclose(box, np.multiply(reference, 3), atol=24)
    assert find_faces(np.zeros((16, 16, 3), np.uint8)) == []


def test_overlapping_boxes_are_counted_once_and_cut_at_the_edge() -> None:
    assert covered_fraction([(0, 0, 5, 10), (0, 0, 5, 10)], 10, 10) == 0.5
    assert covered_fraction([(8, 8, 10, 10)], 10, 10) == pytest.approx(0.04)
    assert covered_fraction([], 10, 10) == 0


@needs_nudenet
def test_a_dressed_astronaut_is_no_nudity_and_is_seen_as_in_its_file(tmp_path: Path) -> None:
    settings = SafetySettings(nsfw=True)
    answer = Safety(settings)(rows_of(skimage.data.astronaut(), skimage.data.coffee())).to_pylist()
    assert all(row["nsfw"] == 0 and row["nsfw_label"] is None and row["error"] is None for row in answer)
    Image.fromarray(skimage.data.astronaut()).save(tmp_path / "astronaut.png")
    from_file = safety._nude_detector().detect(str(tmp_path / "astronaut.png"))
    assert "FACE_FEMALE" in {one["class"] for one in from_file}  # it does look
    assert safety._seen(skimage.data.astronaut()) == from_file


@needs_nudenet
def test_the_highest_exposed_part_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = importlib.import_module("nudenet.nudenet").__labels
    assert set(labels) > safety.NSFW_LABELS and len(labels) == 18
    detections = [
        {"class": "FACE_FEMALE", "score": 0.99}, {"class": "BUTTOCKS_EXPOSED", "score": 0.4}, {"class": "FEMALE_BREAST_EXPOSED", "score": 0.7},
    ]  # fmt: skip
    monkeypatch.setattr(safety._nude_detector(), "detect", lambda _: detections)
    assert safety._nsfw(np.zeros((8, 8, 3), np.uint8)) == {"nsfw": 0.7, "nsfw_label": "FEMALE_BREAST_EXPOSED"}


def test_a_bad_image_is_a_row_with_its_reason() -> None:
    rows = pa.table({"image_id": ["broken"], "bytes": pa.array([b"no image"], pa.binary())})
    [row] = Safety(SafetySettings(faces=True))(rows).to_pylist()
    assert row["subject_id"] == "broken" and "UnidentifiedImageError" in row["error"] and row["faces"] is None


def test_a_package_that_is_missing_is_named_with_its_extra() -> None:
    with pytest.raises(MissingExtra, match=r"refresh.text.ocr needs the package no_such_reader.*pip install 'dreamlite-pipeline\[ocr\]'"):
        require_extra("no_such_reader", "ocr", "text.ocr")
    require_extra("json", "ocr", "text.ocr")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny image classifier of the real class."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        id2label={0: "no watermark", 1: "Watermark"}, label2id={"no watermark": 0, "Watermark": 1},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_a_watermark_classifier_by_path_gives_the_probability_of_its_label(classifier: Path) -> None:
    import torch
    from transformers import AutoImageProcessor, ViTForImageClassification

    settings = SafetySettings(watermark=str(classifier))
    [row] = Safety(settings, "weights")(rows_of(skimage.data.coffee())).to_pylist()
    inputs = AutoImageProcessor.from_pretrained(classifier, backend="pil")(images=Image.fromarray(skimage.data.coffee()), return_tensors="pt")
    with torch.no_grad():
        wanted = ViTForImageClassification.from_pretrained(classifier).eval()(**inputs).logits.softmax(-1)[0, 1]
    assert row["watermark"] == pytest.approx(float(wanted), abs=1e-6) and row["faces"] is None
    assert op_version(Safety(settings, "weights")) != op_version(Safety(settings, "others"))
