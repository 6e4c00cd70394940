"""SANA's draw: probabilities by the formula, the same in SQL, and a draw that depends on row, epoch and seed alone."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from dreamlite_data import schema
from dreamlite_data.lake import Lake
from dreamlite_data.operators.caption_draw import CaptionChoice, draw_caption, draw_probabilities


def choice(name: str, score: float | None, style: str = "short") -> CaptionChoice:
    return CaptionChoice(name, style, f"caption {name}", score)


def test_thirty_against_twenty_seven_is_2_9_to_1_and_below_the_threshold_nothing() -> None:
    first, second, third = draw_probabilities([choice("a", 30.0), choice("b", 27.0), choice("c", 24.9)])
    assert first / second == pytest.approx((30 / 27) ** 10) == pytest.approx(2.868, abs=1e-3)
    assert third == 0 and first + second == pytest.approx(1)


def test_without_a_passing_caption_the_best_is_certain_then_the_providers_then_the_first() -> None:
    assert draw_probabilities([choice("a", 12.0), choice("b", 20.0), choice("c", None)]).tolist() == [0, 1, 0]
    assert draw_probabilities([choice("a", None), choice("b", None, "provider")]).tolist() == [0, 1]
    assert draw_probabilities([choice("b", None), choice("a", None)]).tolist() == [0, 1]
    assert draw_probabilities([choice("a", -3.0), choice("b", -9.0)], threshold=-10).tolist() == [1, 0]
    with pytest.raises(ValueError, match="without captions"):
        draw_probabilities([])


def test_the_draw_is_fixed_by_row_epoch_and_seed_and_by_nothing_else() -> None:
    choices = [choice(name, score) for name, score in zip("abcd", (31.0, 30.0, 29.0, 28.0), strict=True)]
    drawn = [draw_caption(choices, f"row-{row}", epoch, 7).caption_id for row in range(20) for epoch in range(5)]
    assert drawn == [draw_caption(choices[::-1], f"row-{row}", epoch, 7).caption_id for row in range(20) for epoch in range(5)]
    assert drawn != [draw_caption(choices, f"row-{row}", epoch, 8).caption_id for row in range(20) for epoch in range(5)]
    assert any(len(set(drawn[row * 5 : row * 5 + 5])) > 1 for row in range(20))  # another epoch, another caption


def test_captions_are_drawn_as_often_as_their_probability_says() -> None:
    choices = [choice(name, score) for name, score in zip("abc", (31.0, 29.0, 27.0), strict=True)]
    counts = collections.Counter(draw_caption(choices, f"row-{row}", 0, 0).caption_id for row in range(6000))
    expected = 6000 * draw_probabilities(choices)
    statistic = sum((counts[one.caption_id] - wanted) ** 2 / wanted for one, wanted in zip(choices, expected, strict=True))
    assert statistic < 13.8  # the 99.9 % point of chi-square with two degrees of freedom


def test_sql_gives_the_probabilities_of_the_function(lake: Lake) -> None:
    rng = np.random.default_rng(0)
    captions, similarities, by_image = [], [], collections.defaultdict(list)
    for image in range(30):
        for number in range(4):
            name = f"{image:02}-{number}"
            # A third of the images has no scores at all, a third only low ones.
            score = [None, float(np.float32(rng.uniform(5, 24))), float(np.float32(rng.uniform(20, 36)))][image % 3]
            style = "provider" if number == image % 5 else "short"
            captions.append({"caption_id": name, "image_id": f"image-{image}", "style": style, "text": name, "captioner": "x"})
            similarities.append({"subject_id": name, "op_version": "s1", "clip_score": score, "similarity": None})
            by_image[f"image-{image}"].append(choice(name, score, style))
    described = [{"subject_id": row["image_id"], "op_version": "d1", "caption_id": row["caption_id"]} for row in captions]
    versions = [{"name": "similarity", "op_version": "s1", "position": 0}, {"name": "describe_x_short", "op_version": "d1", "position": 0}]
    rows = {"captions": captions, "op_similarity": similarities, "op_describe": described, "operator_versions": versions}
    lake.append({name: schema.rows_table(name, table) for name, table in rows.items()})
    for view, threshold, temperature in (("caption_choices", 25.0, 0.1), ("caption_choices_at(22.0, 0.5)", 22.0, 0.5)):
        found = {row["caption_id"]: row["probability"] for row in lake.query_read_only(f"SELECT * FROM {view}").to_pylist()}
        assert len(found) == 120
        for choices in by_image.values():
            wanted = draw_probabilities(choices, threshold, temperature)
            assert [found[one.caption_id] for one in choices] == pytest.approx(wanted.tolist(), abs=1e-12)


def test_a_caption_that_the_verifier_refutes_takes_no_part(lake: Lake) -> None:
    lake.append({
        "captions": schema.rows_table("captions", [
            {"caption_id": name, "image_id": "i", "style": "provider", "text": name, "captioner": "x"} for name in ("right", "wrong")
        ]),
        "op_ingest": schema.rows_table("op_ingest", [
            {"subject_id": name, "op_version": "g", "caption_id": name, "image_id": "i", "task": "generate"} for name in ("right", "wrong")
        ]),
        "op_verify_caption": schema.rows_table("op_verify_caption", [
            {"subject_id": "wrong", "op_version": "v", "in_language": True, "matches": False}
        ]),
        "operator_versions": schema.rows_table("operator_versions", [
            {"name": "ingest", "op_version": "g", "position": 0}, {"name": "verify_caption", "op_version": "v", "position": 0}
        ]),
    })  # fmt: skip
    rows = lake.query("SELECT caption_id, probability FROM caption_choices").to_pylist()
    assert rows == [{"caption_id": "right", "probability": 1.0}]
