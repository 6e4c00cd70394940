"""Accuracy with and without ties is what counting by hand gives, and the tie threshold the best one that there is."""

import json

import numpy as np
import pytest

from dreamlite_data.rewards.pairs import (
    PairsError,
    Share,
    accuracy_rows,
    pair_accuracy,
    score_pairs,
    tie_threshold,
)


def agreeing(human, model, threshold) -> int:
    return sum((0 if abs(m) <= threshold else np.sign(m)) == h for h, m in zip(human, model, strict=True))


def test_the_threshold_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(60):
        human = rng.integers(-1, 2, rng.integers(1, 30))
        model = (human * 0.5 + rng.normal(size=len(human))).round(rng.integers(0, 3))  # rounding makes equal differences
        best = max(agreeing(human, model, each) for each in [0.0, *np.abs(model)])
        found = tie_threshold(human, model)
        assert agreeing(human, model, found) == best
        assert all(agreeing(human, model, each) < best for each in [0.0, *np.abs(model)] if each < found)


def test_accuracy_is_what_counting_gives():
    labels, differences = [1, 1, -1, 0, 0, -1], [2.0, -1.0, -3.0, 0.1, -0.2, 0.0]
    found = pair_accuracy(labels, differences, [0, 1, 0, 1, 0, 1])
    assert (found.pairs, found.ties) == (6, 2)
    assert found.without_ties == Share(2, 4)  # an equal score is no preference, and so is wrong
    assert found.with_ties == Share(4, 6) and found.threshold == 0.2
    low, high = found.with_ties.interval
    assert (low, high) == pytest.approx((0.3000, 0.9032), abs=1e-4)  # Wilson's formula for 4 of 6 at z = 1.96


def test_a_threshold_from_the_other_half_does_not_flatter():
    rng = np.random.default_rng(1)
    labels = rng.integers(-1, 2, 400)
    found = pair_accuracy(labels.tolist(), rng.normal(size=400).tolist(), rng.integers(0, 2, 400).tolist())
    assert found.with_ties.value >= 1 / 3 and found.with_ties.value >= found.held_out.value
    assert abs(found.held_out.value - 1 / 3) < 0.08  # scores that know nothing


def test_no_clear_pair_and_one_half_give_no_share():
    found = pair_accuracy([0, 0], [0.5, 0.1], [1, 1])
    assert found.without_ties.value is None and found.without_ties.interval is None and found.held_out.value is None
    assert found.with_ties == Share(2, 2)
    with pytest.raises(PairsError, match="no pair"):
        pair_accuracy([], [], [])


# -- from files


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PAIRS = [
    {"id": index, "image_a": f"image{index % 4}.png", "image_b": f"image{(index + 1) % 4}.png", "prompt": f"cat {index}"} for index in range(5)
]


def test_pairs_agree_with_labels_made_of_the_scores(short_hpsv3, pictures):
    scored = score_pairs(short_hpsv3, write(pictures / "p.jsonl", [pair | {"preferred": "a"} for pair in PAIRS]))
    differences = scored.differences["score"]
    better = ["a" if each > 0 else "b" for each in differences]
    assert len(set(better)) == 2 and not scored.errors
    right = [pair | {"preferred": side, "mine": "b" if side == "a" else "A"} for pair, side in zip(PAIRS, better, strict=True)]
    (row,) = accuracy_rows(score_pairs(short_hpsv3, write(pictures / "p.jsonl", right)))
    assert (row["judge"], row["pairs"], row["without_ties"]) == ("score", 5, 1.0)
    (row,) = accuracy_rows(score_pairs(short_hpsv3, pictures / "p.jsonl", "mine"))
    assert row["without_ties"] == 0.0
    labels = write(pictures / "l.jsonl", [{"id": pair["id"], "preferred": pair["mine"]} for pair in right[::-1]])
    (row,) = accuracy_rows(score_pairs(short_hpsv3, pictures / "p.jsonl", labels_path=labels))
    assert row["without_ties"] == 0.0


def test_heads_are_held_against_their_own_label_or_else_the_overall_one(short_editreward, pictures):
    pair = {"source": "image0.png", "edited_a": "image1.png", "edited_b": "image2.png", "instruction": "x", "preferred": "a"}
    first = score_pairs(short_editreward, write(pictures / "p.jsonl", [pair]))
    assert set(first.labels) == {"score", "follow", "quality"} and all(labels == [1] for labels in first.labels.values())
    assert first.differences["score"][0] == pytest.approx((first.differences["follow"][0] + first.differences["quality"][0]) / 2, abs=1e-5)
    second = score_pairs(short_editreward, write(pictures / "p.jsonl", [pair | {"preferred_quality": "tie"}]))
    assert second.labels == {"score": [1], "follow": [1], "quality": [0]}
    del pair["preferred"]
    third = score_pairs(short_editreward, write(pictures / "p.jsonl", [pair | {"preferred_quality": "b"}]))
    assert third.labels == {"quality": [-1]}


def test_pairs_without_label_or_image_are_left_out_and_named(short_hpsv3, pictures):
    pair = PAIRS[0] | {"preferred": "a"}
    rows = [PAIRS[0], pair | {"preferred": "c"}, pair | {"image_b": "no.png"}, pair | {"preferred": None}, {"preferred": "a"}, pair]
    scored = score_pairs(short_hpsv3, write(pictures / "p.jsonl", rows))
    assert len(scored.labels["score"]) == 1
    errors = dict(scored.errors)
    assert set(errors) == {1, 2, 3, 4, 5}
    assert "no label" in errors[1] and "'c' is not" in errors[2] and errors[3].startswith("side b") and "no label" in errors[4]
    assert "'image_a' is missing" in errors[5]
    with pytest.raises(PairsError, match="line 1: no label"):
        accuracy_rows(score_pairs(short_hpsv3, write(pictures / "p.jsonl", rows[:1])))


@pytest.mark.parametrize(
    ("labels", "words"),
    [([{"preferred": "a"}], "no 'id'"), ([{"id": 1, "preferred": "a"}] * 2, "has a label already"), ([{"id": [1]}], "no 'id'")],
)
def test_a_labels_file_that_cannot_be_joined_is_refused(short_hpsv3, pictures, labels, words):
    with pytest.raises(PairsError, match=words):
        score_pairs(short_hpsv3, write(pictures / "p.jsonl", PAIRS), labels_path=write(pictures / "l.jsonl", labels))


def test_a_pair_without_its_label_line_is_left_out(short_hpsv3, pictures):
    labels = write(pictures / "l.jsonl", [{"id": 0, "preferred": "a"}])
    scored = score_pairs(short_hpsv3, write(pictures / "p.jsonl", PAIRS[:2]), labels_path=labels)
    assert [number for number, _ in scored.errors] == [2] and "id 1" in scored.errors[0][1]
