"""Which models measure is part of the caption step's key, and where they run is not; a call that failed for a while is made again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamlite_data.chat import endpoint
from dreamlite_data.lake import Lake
from flows import engine
from flows.config import ConfigError, load_config
from flows.refresh import refresh_steps
from flows.step import Step
from tests.dreamlite_data.counting_server import CountingServer, words_about_it

ENDPOINT = "refresh.captions=[{backend: endpoint, styles: [short], model: captioner-7b, base_url: 'http://one/v1'}]"


def caption_step(*overrides: str) -> Step:
    return next(step for step in refresh_steps(load_config("smoke", overrides)) if step.name == "caption")


def parts(step: Step) -> tuple:
    return step.spec, step.external()


def test_a_changed_model_style_or_measure_makes_the_step_run_again() -> None:
    base = parts(caption_step())
    for change in (ENDPOINT, "refresh.captions=[{styles: [dense]}]", "refresh.safety.faces=true", "refresh.text.ocr=true",
                   "refresh.embed={model: openai/clip, revision: abc}"):  # fmt: skip
        assert parts(caption_step(change)) != base, change
    assert parts(caption_step(ENDPOINT)) != parts(caption_step(ENDPOINT.replace("[short]", "[tag]")))


def test_where_and_how_a_model_is_reached_changes_nothing() -> None:
    elsewhere = ENDPOINT.replace("http://one", "https://two").replace("}]", ", timeout_s: 5, concurrency: 1, key_variable: KEY, num_gpus: 1}]")
    assert parts(caption_step(ENDPOINT)) == parts(caption_step(elsewhere))


def test_other_weights_under_the_same_path_make_the_step_run_again(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = parts(caption_step(f"refresh.embed.model={tmp_path}"))
    assert parts(caption_step(f"refresh.embed.model={tmp_path}")) == before
    (tmp_path / "config.json").write_text('{"hidden_size": 2}')
    assert parts(caption_step(f"refresh.embed.model={tmp_path}")) != before


def test_a_backend_that_lacks_something_is_refused_in_one_sentence() -> None:
    with pytest.raises(ConfigError, match="the captions backend 'endpoint' also needs base_url"):
        load_config("smoke", [ENDPOINT.replace(", base_url: 'http://one/v1'", "")])
    with pytest.raises(ConfigError, match="unknown setting 'refresh.captions.0.stiles'.*did you mean 'refresh.captions.styles'"):
        load_config("smoke", [ENDPOINT.replace("styles", "stiles")])


def test_a_bad_night_at_the_captioner_is_made_good_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.001)
    (tmp_path / "own").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (72, 80, 3), dtype=np.uint8)).save(tmp_path / "own" / f"{number}.png")
    with CountingServer() as server:
        overrides = [
            "refresh.scenes={t2i_rows: 0, edit_rows: 0}", "refresh.photos.enabled=false", "refresh.executor=local", "refresh.workers=1",
            f"refresh.extra_sources=[{{name: own, kind: folder, path: {tmp_path / 'own'}}}]",
            ENDPOINT.replace("http://one/v1", server.url).replace("}]", ", attempts: 1}]"),
        ]  # fmt: skip

        def night() -> list[str]:
            return engine.execute("refresh", "smoke", tmp_path / "lake", overrides, "verify", "inline", say=lambda line: None).computed

        answers = [(503, b"busy", {})]
        server.reply = lambda body: answers.pop() if answers else words_about_it(body)
        assert night()[-2:] == ["caption", "verify"]
        with Lake(tmp_path / "lake", read_only=True) as lake:
            assert lake.query("SELECT count(*) FILTER (error IS NULL) AS good, count(*) FILTER (retry) AS bad FROM current_describe").to_pylist() == [
                {"good": 2, "bad": 1}
            ]
        assert night() == ["caption", "verify"] and server.answered == 4
        assert night() == [] and server.answered == 4
        with Lake(tmp_path / "lake", read_only=True) as lake:
            assert lake.query("SELECT count(*) AS n FROM current_describe WHERE error IS NULL")["n"].to_pylist() == [3]
