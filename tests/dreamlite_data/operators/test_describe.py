"""Captioners put a picture into the words of a style; what a model says is cleaned, and what it refuses is an error."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from dreamlite_data import scenes
from dreamlite_data.model_settings import CaptionBackend
from dreamlite_data.operators.base import op_version
from dreamlite_data.operators.caption import Picture, SceneCaptioner, scene_words
from dreamlite_data.operators.describe import Describe, clean, prompts
from dreamlite_data.responses import Response
from dreamlite_data.settings import RefreshSettings

STYLES = ("tag", "short", "medium", "dense")
SCENE = scenes.Scene(
    (scenes.SceneObject("red", "circle", "large", "top left"), scenes.SceneObject("blue", "square", "small", "centre")), "grey", "plain"
)


def picture(scene: scenes.Scene) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(scenes.render(scene)).save(buffer, "PNG")
    return Picture(hashlib.sha256(buffer.getvalue()).hexdigest(), buffer.getvalue())


def test_the_scene_reader_writes_each_style_and_the_longer_ones_say_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = scenes.sample_scene(rng)
        words = {style: SceneCaptioner().describe([picture(scene)], style)[0].text for style in STYLES}
        assert len(words["tag"]) > 0 and len(words["short"]) < len(words["medium"]) < len(words["dense"])
        assert scenes.parse_caption(words["medium"]).key() == scene.key()
        for item in scene.objects:
            assert all(f"{item.colour} {item.shape}" in text for text in words.values())
            assert item.position in words["dense"] and item.position not in words["tag"]


def test_the_short_words_are_english() -> None:
    scene = scenes.Scene((scenes.SceneObject("orange", "circle", "large", "top left"), *SCENE.objects[1:]), "grey", "plain")
    assert scene_words(scene, "short", "") == "an orange circle and a blue square"
    assert scene_words(scene, "tag", "") == "orange circle, blue square, plain grey background"


def test_a_style_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no caption style 'poem'"):
        scene_words(SCENE, "poem", "00" * 32)
    with pytest.raises(ValueError, match="captions.0.styles"):
        RefreshSettings(captions=[{"styles": ["poem"]}])


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("  a cat\n on a  mat ", "a cat on a mat"),
        ('"a cat"', "a cat"),
        ('"a" and "b"', '"a" and "b"'),
        ("<think>is it a dog?\nno</think>\na cat", "a cat"),
        ("is it a dog? no</think>a cat", "a cat"),
    ],
)
def test_an_answer_is_cleaned(said: str, kept: str) -> None:
    assert clean(said) == kept


def test_a_refusal_and_an_empty_answer_are_errors() -> None:
    from dreamlite_data.operators.describe import _described

    assert _described(Response("I'm sorry, I can't describe people.")).error == "the model refused: I'm sorry, I can't describe people."
    assert _described(Response("<think>hm</think>")).error == "the answer has no text"
    assert _described(Response("A sorry-looking cat.")).text == "A sorry-looking cat."
    passing = _described(Response(None, "busy", retry=True))
    assert (passing.text, passing.error, passing.retry) == (None, "busy", True)


def test_every_style_has_a_prompt_of_its_own_id() -> None:
    styles = prompts()["styles"]
    assert tuple(styles) == STYLES
    assert len({asked["id"] for asked in styles.values()}) == 4 == len({asked["prompt"] for asked in styles.values()})


def test_model_prompt_and_style_make_the_version_and_where_it_runs_does_not(tmp_path) -> None:
    backend = CaptionBackend(backend="endpoint", styles=("short", "dense"), model="captioner-7b", base_url="http://one/v1")

    def version(style: str = "short", weights: str = "", **changes: object) -> str:
        return op_version(Describe(CaptionBackend(**{**backend.model_dump(), **changes}), style, weights, tmp_path))

    assert version() == version(base_url="http://two/v1", timeout_s=5, concurrency=2, num_gpus=1, key_variable="KEY", batch_images=1)
    assert len({version(), version("dense"), version(model="captioner-70b"), version(weights="w")}) == 4


def test_backends_are_checked_with_what_they_need() -> None:
    for wrong, said in [
        ({"backend": "endpoint", "styles": ["short"], "model": "m"}, "'endpoint' also needs base_url"),
        ({"backend": "transformers", "model": "m"}, "'transformers' also needs styles"),
        ({"backend": "scene", "model": "m"}, "'scene' has no model"),
        ({"backend": "endpoint", "styles": ["short"], "model": "m", "base_url": "file:///etc/passwd"}, "base_url"),
        ({"backend": "endpoint", "style": ["short"]}, "did you mean 'styles'"),
    ]:
        with pytest.raises(ValueError, match=said):
            CaptionBackend(**wrong)
    twice = {"backend": "scene", "styles": ["short"]}
    with pytest.raises(ValueError, match="asks twice for the captions of scene-reader \\(short\\)"):
        RefreshSettings(captions=[twice, twice])
