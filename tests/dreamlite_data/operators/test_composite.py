"""Composites change what their mask covers and nothing else, say what they did, and are the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dreamlite_data.images import decode_stored, encode_png
from dreamlite_data.operators import composite
from dreamlite_data.operators.change import changed_pixels, decode_mask
from dreamlite_data.operators.cutouts import CutOutError, CutOutFolder, DrawnCutOuts, folder_digest
from dreamlite_data.operators.edit import Edit
from dreamlite_data.operators.wording import COMMON_COLOURS, draw_colour, plural, said_colour, said_difference, said_direction, said_sides
from dreamlite_data.sources.base import DigestCache


def _photo(number: int, size: tuple[int, int] = (96, 120)) -> np.ndarray:
    return np.random.default_rng(number).integers(60, 160, (*size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def made() -> tuple[pa.Table, dict[str, pa.Table], Edit, dict[str, np.ndarray]]:
    cutouts = DrawnCutOuts()
    operator = Edit(7, composite.CompositeInstructor(cutouts), composite.CompositeEditor(cutouts), "edit_composite")
    photos = {f"{number:064x}": _photo(number) for number in range(4)}
    rows = pa.table({"image_id": list(photos), "bytes": [encode_png(photo) for photo in photos.values()]})
    answer = operator(rows)
    return answer, operator.side_tables(rows, answer), operator, photos


def test_every_operation_is_made_with_its_way_back(made: tuple) -> None:
    answer, tables, _, _ = made
    assert answer["edits"].to_pylist() == [7] * 4 and answer["error"].null_count == 4
    edits = tables["edits"].to_pylist()
    forward, back = ([row for row in edits if row["relation"] == relation] for relation in ("", "inverse"))
    assert {row["edit_type"] for row in forward} == set(composite.OPERATIONS)
    pictures = {row["edit_id"]: (row["source_image_id"], row["target_image_id"]) for row in edits}
    assert len(back) == 28  # drawn cut-outs have a colour in their name, so even a recolouring can be said backwards
    for row in back:
        assert pictures[row["edit_id"]] == pictures[row["parent_edit_id"]][::-1]
    back_of = {"add": "remove", "remove": "add"}
    kinds = {row["edit_id"]: row["edit_type"] for row in edits}
    assert all(row["edit_type"] == back_of.get(kinds[row["parent_edit_id"]], kinds[row["parent_edit_id"]]) for row in back)


def test_nothing_changes_outside_the_mask_and_most_changes_inside(made: tuple) -> None:
    _, tables, _, photos = made
    pixels = {row["image_id"]: decode_stored(row["bytes"]) for row in tables["images"].to_pylist()} | photos
    masks = {row["edit_id"]: row for row in tables["edit_masks"].to_pylist()}
    assert len(masks) == len(tables["edits"])
    for row in tables["edits"].to_pylist():
        source, target = pixels[row["source_image_id"]], pixels[row["target_image_id"]]
        mask = decode_mask(masks[row["edit_id"]]["mask_png"])
        assert mask.shape == target.shape[:2] and masks[row["edit_id"]]["mask_fraction"] == pytest.approx(mask.mean())
        assert np.array_equal(source[~mask], target[~mask]), row["instruction"]
        assert changed_pixels(source, target)[mask].mean() > 0.5, row["instruction"]


def test_the_same_photo_gives_the_same_bytes_and_another_gives_others(made: tuple) -> None:
    _, tables, operator, photos = made
    image_id = next(iter(photos))
    alone = operator(pa.table({"image_id": [image_id], "bytes": [encode_png(photos[image_id])]}))
    again = operator.side_tables(None, alone)
    assert set(again["images"]["image_id"].to_pylist()) <= set(tables["images"]["image_id"].to_pylist())
    assert set(again["edits"]["edit_id"].to_pylist()) == {
        row["edit_id"] for row in tables["edits"].to_pylist() if row["edit_id"] in set(alone["edit_ids"][0].as_py())
    }
    assert len({row["instruction"] for row in tables["edits"].to_pylist()}) > 40


def test_places_numbers_and_colours_in_the_words_are_those_in_the_picture() -> None:
    cutouts = DrawnCutOuts()
    for number in range(30):
        drawn = composite.draw_things("add", f"{number}", cutouts, companion=True)
        assert drawn.companion.noun != drawn.thing.noun
        plan = composite.add(drawn)
        row, column = divmod(plan.after[-1].cell, 3)
        expected = {("top", None, "bottom")[row], ("left", None, "right")[column]} - {None}
        assert all(said_sides(form.text) == expected for form in plan.forms), plan.forms
        assert {said_colour(form.text) for form in plan.forms} == {drawn.thing.colour}
        counted = composite.count(composite.draw_things("count", f"{number}", cutouts))
        difference = abs(len(counted.after) - len(counted.before))
        assert {said_difference(form.text) for form in counted.forms} - {None} == {difference}


@pytest.mark.parametrize(("text", "sides"), [
    ("put the cup in the top left corner", {"top", "left"}), ("remove the man on the right side", {"right"}),
    ("move it to the left", set()), ("remove the plate on the left of the cup", set()), ("make the sky blue", set()),
    ("add a star at the bottom of the picture", {"bottom"}), ("from the one on the left to the one on the right", set()),
])  # fmt: skip
def test_sides_are_read_where_a_place_is_named(text: str, sides: set[str]) -> None:
    assert said_sides(text) == sides


def test_words_of_number_direction_and_colour() -> None:
    assert said_difference("change the number of cats from one to four") == 3 and said_difference("there should be three cats") is None
    assert said_direction("make it brighter") == ("brightness", 1) and said_direction("add natural colours to this black and white photo") == ("saturation", 1)
    assert said_direction("make it brighter and the sky darker") is None and said_direction("add a dog") is None
    assert said_colour("change the red car to blue") == "blue"
    assert [plural(word) for word in ("box", "cherry", "toy", "red fish", "mouse")] == ["boxes", "cherries", "toys", "red fish", "mice"]


def test_common_colours_are_four_fifths_and_the_forbidden_never_drawn() -> None:
    drawn = [draw_colour(number, without={"red", "navy"}) for number in range(4000)]
    assert sum(colour in COMMON_COLOURS for colour in drawn) / 4000 == pytest.approx(0.8, abs=0.025)
    assert not {"red", "navy"} & set(drawn) and len(set(drawn)) == 18


# --- cut-outs from files ---------------------------------------------------------------------------------------------


def _write(folder: Path, name: str, pixels: np.ndarray, caption: str | None = None) -> None:
    Image.fromarray(pixels).save(folder / f"{name}.png")
    if caption is not None:
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")


def _disc(colour: tuple[int, int, int]) -> np.ndarray:
    down, across = np.mgrid[:64, :64]
    alpha = np.where((down - 32) ** 2 + (across - 32) ** 2 < 700, 255, 0)
    return np.dstack([np.full((64, 64, 3), colour), alpha]).astype(np.uint8)


def test_a_folder_gives_what_can_be_used_and_says_what_cannot(tmp_path: Path) -> None:
    folder = tmp_path / "stamps"
    (folder / "deep").mkdir(parents=True)
    _write(folder, "a", _disc((200, 30, 30)), "A red apple.\nfr.utf8=Une pomme rouge.\n")
    _write(folder / "deep", "old_boat", _disc((30, 30, 200)))
    _write(folder, "b", _disc((1, 2, 3)), "The number of a very long and winding story about apples.")
    _write(folder, "opaque", _disc((1, 2, 3))[..., :3], "A picture.")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n")
    outside = tmp_path / "outside.png"
    Image.fromarray(_disc((9, 9, 9))).save(outside)
    (folder / "linked.png").symlink_to(outside)
    with pytest.warns(UserWarning, match="2 of 5 PNG files"):
        cutouts = CutOutFolder(folder, "digest")
    assert [(item.cutout_id, item.noun, item.colour) for item in cutouts.items] == [
        ("a.png", "apple", "red"), ("b.png", "number", None), ("deep/old_boat.png", "old boat", None)]  # fmt: skip
    assert cutouts.pixels(cutouts.items[0]).shape == (53, 53, 4)
    digests = DigestCache(tmp_path / "digests.json")
    before = folder_digest(folder, digests)
    (folder / "a.txt").write_text("A green apple.")
    assert folder_digest(folder, digests) != before


def test_a_folder_without_cutouts_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CutOutError, match="no folder of cut-outs at .*refresh.composite.cutouts"):
        CutOutFolder(tmp_path / "absent", "d")
    with pytest.raises(CutOutError, match="wants PNG files with transparency"):
        CutOutFolder(tmp_path, "d")


def test_a_file_that_breaks_later_costs_its_requests_only(tmp_path: Path) -> None:
    for name, colour in (("one", (200, 0, 0)), ("two", (0, 200, 0)), ("three", (0, 0, 200))):
        _write(tmp_path, name, _disc(colour), f"A {name} thing.")
    cutouts = CutOutFolder(tmp_path, "d")
    payload = (tmp_path / "two.png").read_bytes()
    (tmp_path / "two.png").write_bytes(payload[: len(payload) // 2])
    operator = Edit(7, composite.CompositeInstructor(cutouts), composite.CompositeEditor(cutouts), "edit_composite")
    photo = encode_png(np.full((90, 90, 3), 120, np.uint8))
    answer = operator(pa.table({"image_id": [f"{number:064x}" for number in range(6)], "bytes": [photo] * 6}))
    assert answer["error"].null_count == 6 and 0 < sum(answer["edits"].to_pylist()) < 42
