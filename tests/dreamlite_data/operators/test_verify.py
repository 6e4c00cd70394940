"""The verifier agrees with true captions and edits, and with none of the ways they can be wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from dreamlite_data import scenes
from dreamlite_data.images import decode_stored, encode_png
from dreamlite_data.operators.caption import Caption
from dreamlite_data.operators.change import changed_pixels, mask_cells
from dreamlite_data.operators.instruction import parse_instruction
from dreamlite_data.operators.verify import VerifyCaption, VerifyEdit
from tests.dreamlite_data.operators.triplets import triplet_rows


def _draw(seed: int) -> tuple[scenes.Scene, scenes.Edit, str]:
    rng = np.random.default_rng(seed)
    scene = scenes.sample_scene(rng)
    edit = scenes.sample_edit(scene, rng)
    return scene, edit, scenes.instruction(edit, scene, rng)


def test_every_instruction_is_read_back_as_the_edit_that_wrote_it() -> None:
    kinds = set()
    for seed in range(400):
        scene, edit, words = _draw(seed)
        found, why = parse_instruction(words, scene)
        assert found is not None, (words, why)
        assert scenes.apply_edit(scene, found).key() == scenes.apply_edit(scene, edit).key()
        kinds.add(edit.kind)
    assert kinds == set(scenes.EDIT_KINDS)


@pytest.mark.parametrize("words", ["make it nicer", "remove the red circle and the dog", "", "remove the red circle; DROP TABLE edits"])
def test_other_words_are_not_taken_for_an_instruction(words: str) -> None:
    assert parse_instruction(words, _draw(0)[0]) == (None, "unknown")


def test_an_instruction_about_an_absent_object_says_so() -> None:
    scene = _draw(1)[0]
    named = {(item.colour, item.shape) for item in scene.objects}
    colour, shape = next((c, s) for c in scenes.COLOURS for s in scenes.SHAPES if (c, s) not in named)
    found, why = parse_instruction(f"remove the {colour} {shape}", scene)
    assert found is None and why == f"the source shows 0 objects called {colour} {shape}"


def _verify(source: np.ndarray, target: np.ndarray, words: str) -> dict:
    readings = [scenes.read_scene(pixels).scene if pixels.shape[0] == 64 else None for pixels in (source, target)]
    rows = triplet_rows([(source, target, words)], source_scene=[readings[0] and readings[0].to_json()], target_scene=[readings[1] and readings[1].to_json()])
    return VerifyEdit()(rows).to_pylist()[0]


@pytest.mark.parametrize("seed", range(12))
def test_a_true_edit_matches_and_a_wrong_one_does_not(seed: int) -> None:
    scene, edit, words = _draw(seed)
    source, target = scenes.render(scene), scenes.render(scenes.apply_edit(scene, edit))
    true = _verify(source, target, words)
    assert (true["matches"], true["error"]) == (True, None), true["reason"]
    assert true["outside_fraction"] < 0.002 and true["edited_fraction"] > 0.004
    nothing = _verify(source, source, words)
    assert not nothing["matches"] and nothing["edited_fraction"] == 0
    other = _verify(source, scenes.render(_draw(seed + 100)[0]), words)
    assert not other["matches"] and other["reason"]


def test_an_edit_that_also_moves_something_else_does_not_match() -> None:
    seed = next(n for n in range(100) if _draw(n)[1].kind == "recolour" and len(_draw(n)[0].objects) > 1)
    scene, edit, words = _draw(seed)
    target = scenes.apply_edit(scene, edit)
    moved = tuple(dataclasses.replace(item, offset=(item.offset[0] + 4.0, item.offset[1])) if item in scene.objects else item
                  for item in target.objects)  # fmt: skip
    answer = _verify(scenes.render(scene), scenes.render(dataclasses.replace(target, objects=moved)), words)
    assert not answer["matches"] and ("moved" in answer["reason"] or "no scene" in answer["reason"])
    assert answer["outside_fraction"] > 0.002


def test_pictures_of_different_size_are_a_reason_and_no_crash() -> None:
    scene, _, words = _draw(2)
    answer = _verify(scenes.render(scene), np.zeros((32, 32, 3), np.uint8), words)
    assert answer["error"] is None and "differ in size" in answer["reason"]


def test_the_mask_says_where_in_eighths() -> None:
    before, after = np.zeros((64, 128, 3), np.uint8), np.zeros((64, 128, 3), np.uint8)
    after[8:16, 16:32] = 255  # exactly the cell in row 1, column 1 of a picture that is not square
    after[0, 0] = 255  # one of 8 x 16 pixels of the first cell
    cells = np.frombuffer(mask_cells(changed_pixels(before, after)), np.uint8).reshape(8, 8)
    assert cells[1, 1] == 255 and cells[0, 0] == round(255 / 128) and cells.astype(int).sum() == 255 + 2


def test_captions_are_checked_against_what_was_read() -> None:
    scene = _draw(3)[0]
    seen = scenes.read_scene(scenes.render(scene)).scene.to_json()
    other = scenes.caption(_draw(4)[0])
    rows = pa.table({
        "caption_id": ["true", "other", "foreign", "unread"], "text": [scenes.caption(scene), other, "a photo of a cat", other],
        "scene_json": pa.array([seen, seen, seen, None], pa.string()), "reading_reason": pa.array([None, None, None, "blur"], pa.string()),
    })  # fmt: skip
    answers = {row["subject_id"]: row for row in VerifyCaption()(rows).to_pylist()}
    assert [answers[name]["matches"] for name in ("true", "other", "foreign", "unread")] == [True, False, False, False]
    assert [answers[name]["in_language"] for name in ("true", "other", "foreign", "unread")] == [True, True, False, True]
    assert answers["other"]["reason"] == f"the image shows {scenes.caption(scenes.Scene.from_json(seen))}"


def test_the_captioner_says_what_is_there_and_is_silent_on_photos() -> None:
    images = [scenes.render(_draw(seed)[0]) for seed in range(20)] + [np.zeros((80, 100, 3), np.uint8)]
    rows = pa.table({"image_id": [f"{n:064x}" for n in range(21)], "bytes": [encode_png(pixels) for pixels in images]})
    answers = Caption()(rows).to_pylist()
    for seed, answer in enumerate(answers[:20]):
        said = scenes.parse_caption(answer["text"])
        assert said is not None and said.key() == _draw(seed)[0].key()
    assert answers[20]["text"] is None and "100 x 80" in answers[20]["reason"] and answers[20]["error"] is None


def test_a_composed_instruction_is_held_against_the_scene_after_both_steps() -> None:
    scene = _draw(1)[0]
    first = scenes.sample_edit(scene, np.random.default_rng(5), "background")
    middle = scenes.apply_edit(scene, first)
    second = scenes.sample_edit(middle, np.random.default_rng(6), "recolour")
    end = scenes.apply_edit(middle, second)
    words = f"{scenes.instruction(first, scene)}, then {scenes.instruction(second, middle)}"
    assert _verify(scenes.render(scene), scenes.render(end), words)["matches"]
    assert not _verify(scenes.render(scene), scenes.render(middle), words)["matches"]  # only the first step was done
    absent = f"{scenes.instruction(second, middle)}, then {scenes.instruction(second, middle)}"
    assert "objects called" in _verify(scenes.render(scene), scenes.render(end), absent)["reason"]


def test_a_row_that_breaks_the_operator_costs_only_itself() -> None:
    scene, _, words = _draw(5)
    picture = scenes.render(scene)
    rows = triplet_rows([(picture, picture, words)] * 2, source_scene=["{", scene.to_json()], target_scene=[None, scene.to_json()])
    rows = rows.set_column(rows.column_names.index("source_bytes"), "source_bytes", pa.array([b"junk", encode_png(picture)]))
    operator = VerifyEdit()
    bad, fine = operator(rows).to_pylist()
    assert bad["error"] and bad["matches"] is None and fine["error"] is None
    measured = operator.side_tables(rows, None)["op_triplet_measures"].to_pylist()
    assert [row["error"] for row in measured] == [bad["error"], None]


def test_one_decode_serves_both_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr("dreamlite_data.operators.verify.decode_stored", lambda payload: decoded.append(payload) or decode_stored(payload))
    scene, edit, words = _draw(5)
    operator = VerifyEdit()
    operator(triplet_rows([(scenes.render(scene), scenes.render(scenes.apply_edit(scene, edit)), words)], source_scene=[scene.to_json()]))
    [row] = operator.side_tables(None, None)["op_triplet_measures"].to_pylist()
    assert len(decoded) == 2 and row["edited_fraction"] > 0
