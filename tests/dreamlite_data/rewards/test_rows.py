"""Every line of a file gets its row, in order and in bounded batches; a bad one costs itself only."""

import json

import numpy as np
import pytest
from PIL import Image

from dreamlite_data.rewards import rows as rows_module
from dreamlite_data.rewards.rows import score_file

GOOD = [{"image": f"image{index % 4}.png", "prompt": f"a cat {index}"} for index in range(7)]


def write(folder, lines) -> object:
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines) + b"\n")
    return path


@pytest.mark.parametrize("rows_per_batch", [1, 3, 64])
def test_rows_come_in_order_and_do_not_depend_on_the_batch(short_hpsv3, pictures, rows_per_batch):
    found = list(score_file(short_hpsv3, write(pictures, GOOD), rows_per_batch))
    images = [Image.open(pictures / row["image"]) for row in GOOD]
    wanted = short_hpsv3.score(images, [row["prompt"] for row in GOOD])
    assert [row["row"] for row in found] == list(range(1, 8))
    np.testing.assert_allclose([row["mu"] for row in found], wanted.mu, atol=2e-5)
    np.testing.assert_allclose([row["log_sigma"] for row in found], wanted.log_sigma, atol=2e-5)
    assert [row["tokens"] for row in found] == wanted.tokens.tolist()
    assert all(row.keys() == {"row", "mu", "log_sigma", "tokens"} for row in found)


def test_edits_have_the_score_of_each_head(short_editreward, pictures):
    row = {"source": "image0.png", "edited": "image1.png", "instruction": "a cat", "id": "x"}
    (found,) = score_file(short_editreward, write(pictures, [row]))
    both = [found[f"{head}_mu"] for head in ("follow", "quality")]
    assert found["id"] == "x" and found["mu"] == pytest.approx(np.mean(both), abs=1e-6) and both[0] != both[1]
    (swapped,) = score_file(short_editreward, write(pictures, [row | {"source": "image1.png", "edited": "image0.png"}]))
    assert abs(swapped["mu"] - found["mu"]) > 1e-3


def test_a_bad_row_says_why_and_the_others_keep_their_scores(short_hpsv3, pictures, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 4000)
    (pictures / "cut.png").write_bytes((pictures / "image0.png").read_bytes()[:5000])
    (pictures / "program.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    Image.new("L", (3000, 10)).save(pictures / "thin.png")
    bad = {
        1: ({"prompt": "x"}, "'image' is missing"), 2: (b"{not json", "no valid JSON"), 3: ([1], "holds list"),
        4: ({"image": "nothing.png", "prompt": "x"}, "nothing.png"), 5: ({"image": "cut.png", "prompt": "x"}, "truncated"),
        6: ({"image": "program.eps", "prompt": "x"}, "cannot identify"), 7: ({"image": "thin.png", "prompt": "x"}, "aspect"),
        8: ({"image": "image0.png", "prompt": 3}, "'prompt' is int"), 9: (b'{"image": "image0.png", "prompt": "\\ud800"}', "Unicode"),
        10: (b"\xff\xfe", "no valid JSON"), 11: (b"[" * 3000, "no valid JSON"), 12: (b'"' + b"a" * 9000 + b'"', "longer than 4,000 bytes"),
        13: ({"image": ".", "prompt": "x"}, "directory"),
    }  # fmt: skip
    lines = [GOOD[0], *(line for line, _ in bad.values()), GOOD[1]]
    found = {row["row"]: row for row in score_file(short_hpsv3, write(pictures, lines), 5)}
    assert list(found) == list(range(1, 16))
    for number, (_, words) in bad.items():
        assert words in found[number + 1]["error"] and "mu" not in found[number + 1], found[number + 1]
    alone = list(score_file(short_hpsv3, write(pictures, GOOD[:2])))
    assert [found[1]["mu"], found[15]["mu"]] == pytest.approx([row["mu"] for row in alone], abs=2e-5)


def test_a_prompt_too_long_for_a_batch_is_a_bad_row(short_hpsv3, pictures, monkeypatch):
    monkeypatch.setattr("dreamlite_data.rewards.packing.MAX_BATCH_TOKENS", 500)
    lines = [GOOD[0], GOOD[0] | {"prompt": "a very long story " * 60}]
    first, second = score_file(short_hpsv3, write(pictures, lines))
    assert "error" not in first and "more than 500" in second["error"]


def test_no_more_rows_are_read_than_a_batch_holds(short_hpsv3, pictures, monkeypatch):
    taken = []
    original = rows_module.read_json_lines
    monkeypatch.setattr(rows_module, "read_json_lines", lambda path: (taken.append(line.number) or line for line in original(path)))
    found = score_file(short_hpsv3, write(pictures, GOOD), 2)
    next(found)
    assert taken == [1, 2]


def test_blank_lines_and_an_empty_file_are_no_rows(short_hpsv3, pictures):
    assert list(score_file(short_hpsv3, write(pictures, [b"", b"  "]))) == []
    (found,) = score_file(short_hpsv3, write(pictures, [b"", GOOD[0]]))
    assert found["row"] == 2
