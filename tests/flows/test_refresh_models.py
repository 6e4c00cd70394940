"""Which models measure is part of the caption step's key, and where they run is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.config import ConfigError, load_config
from flows.refresh import refresh_steps
from flows.step import Step

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
