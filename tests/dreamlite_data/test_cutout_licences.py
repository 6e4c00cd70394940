"""A composite stands under photo and cut-outs together: both are named on its row, and what may not be passed on stays out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dreamlite_data.cutout_licences import record_cutouts
from dreamlite_data.dataset import DatasetError, open_dataset
from dreamlite_data.images import encode_png
from dreamlite_data.lake import Lake
from dreamlite_data.operators.composite import CompositeEditor, CompositeInstructor
from dreamlite_data.operators.cutouts import CutOutError, CutOutFolder, DrawnCutOuts
from dreamlite_data.operators.edit import Edit
from dreamlite_data.publish import publish
from dreamlite_data.publishing.licences import combined, find_licence
from dreamlite_data.publishing.materials import Material, row_materials
from dreamlite_data.publishing.rows import select_rows
from dreamlite_data.settings import CompositeSettings
from dreamlite_data.sources.base import DigestCache
from dreamlite_data.takedown import forget

PHOTO = np.random.default_rng(5).integers(0, 255, (90, 120, 3), dtype=np.uint8)


def _stamps(folder: Path, **beside: dict) -> Path:
    folder.mkdir()
    for number, name in enumerate(("cup", "hat", "key")):
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[8:56, 16:48] = (40 + 60 * number, 160, 200 - 60 * number, 255)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        if name in beside:
            (folder / f"{name}.json").write_text(json.dumps(beside[name]))
    return folder


@pytest.mark.parametrize(("parts", "name", "may"), [
    (["CC-BY-4.0", "CC0-1.0"], "CC-BY", True),
    (["CC0-1.0", "public domain"], "CC0-1.0", True),
    (["CC-BY-2.0", "GPL-2"], "GPL-2.0", True),
    (["CC-BY-SA-4.0", "CC-BY-4.0", "CC0"], "CC-BY-SA", True),
    (["CC-BY-NC-4.0", "CC-BY-4.0"], "CC-BY-NC", True),
    (["CC-BY-NC-SA-4.0", "CC-BY-NC-4.0"], "CC-BY-NC-SA", True),
    (["GPL-3", "CC-BY-SA-4.0"], "GPL-3.0", True),
    (["GPL-2", "CC-BY-SA-4.0"], "CC-BY-SA + GPL-2.0", False),  # each wants the whole under itself
    (["GPL-2", "CC-BY-NC-4.0"], "GPL-2.0 + CC-BY-NC", False),  # the GPL suffers no further restriction
    (["CC-BY-SA-4.0", "CC-BY-NC-4.0"], "CC-BY-SA + CC-BY-NC", False),
    (["GPL-2", "CC-BY-ND-4.0"], "CC-BY-ND", False),
    (["GPL-2", None], "unknown", False),
])  # fmt: skip
def test_the_licence_of_a_whole_is_the_strictest_that_takes_the_rest(parts: list[str | None], name: str, may: bool) -> None:
    for order in (parts, parts[::-1]):
        found = combined([find_licence(text) for text in order])
        assert (found.name, found.publish) == (name, may) and bool(found.why) != may


def test_every_composite_names_the_cutouts_in_its_pictures(tmp_path: Path) -> None:
    folder = CutOutFolder(_stamps(tmp_path / "stamps"), "d")
    for cutouts in (folder, DrawnCutOuts()):
        known = {cutouts.content_id(item): item.noun for item in cutouts.items}
        operator = Edit(7, CompositeInstructor(cutouts), CompositeEditor(cutouts), "edit_composite")
        operator(pa.table({"image_id": ["a" * 64], "bytes": [encode_png(PHOTO)]}))
        tables = operator.side_tables(None, None)
        parts = {row["edit_id"]: row["cutout_ids"] for row in tables["edit_parts"].to_pylist()}
        assert set(parts) == set(tables["edits"]["edit_id"].to_pylist()) and len(parts) > 7
        for edit in tables["edits"].to_pylist():
            nouns = {known[part] for part in parts[edit["edit_id"]]}
            assert any(noun in edit["instruction"] for noun in nouns) and len(nouns) <= 3
    assert set(known) != {folder.content_id(item) for item in folder.items}


def test_the_lake_knows_each_cutout_and_a_corrected_licence_is_a_few_rows(tmp_path: Path) -> None:
    root = _stamps(tmp_path / "stamps", hat={"licence": "CC0-1.0", "origin": "openclipart", "url": "https://example.org/hat"})
    lake, digests = Lake(tmp_path / "lake"), DigestCache(tmp_path / "digests.json")

    def cutouts() -> dict[str, tuple]:
        return {row["name"]: (row["licence"], row["origin"], row["url"]) for row in lake.query("SELECT * FROM cutouts").to_pylist()}

    assert record_cutouts(lake, CompositeSettings(cutouts=root), digests) == 3
    assert cutouts()["cup.png"] == (None, "stamps", None) and cutouts()["hat.png"] == ("CC0-1.0", "openclipart", "https://example.org/hat")
    snapshot, stated = lake.snapshot(), CompositeSettings(cutouts=root, licence="GPL-2", origin="tuxpaint")
    assert record_cutouts(lake, CompositeSettings(cutouts=root), digests) == 0 and lake.snapshot() == snapshot
    assert record_cutouts(lake, stated, digests) == 3 and record_cutouts(lake, CompositeSettings(), digests) > 100
    assert cutouts()["cup.png"] == ("GPL-2", "tuxpaint", None) and cutouts()["red star"] == ("CC0-1.0", "drawn", None)
    (root / "cup.json").write_text("[1")
    with pytest.raises(CutOutError, match=r"cup.json: .* It may say licence, origin and url"):
        record_cutouts(lake, stated, digests)
    with pytest.raises(ValueError, match="are of a folder of cut-outs"):
        CompositeSettings(licence="GPL-2")


@pytest.fixture
def composites(tmp_path: Path) -> Lake:
    """A photo with composites of three stamps, as a dataset: hat under the GPL, key free, cup without a licence."""
    root = _stamps(tmp_path / "stamps", hat={"licence": "GPL-2"}, key={"licence": "CC0-1.0"})
    cutouts, lake = CutOutFolder(root, "d"), Lake(tmp_path / "lake")
    payload = encode_png(PHOTO)
    operator = Edit(7, CompositeInstructor(cutouts), CompositeEditor(cutouts), "edit_composite")
    operator(pa.table({"image_id": ["photo"], "bytes": [payload]}))
    tables = operator.side_tables(None, None)
    edits = tables["edits"].to_pylist()
    lake.append({
        "images": [{"image_id": "photo", "bytes": payload, "mime": "image/png", "width": 120, "height": 90, "size_bytes": len(payload)}],
        "provenance": [{"image_id": "photo", "record_id": "own/1", "role": "", "source": "own", "licence": "CC-BY-4.0"}],
        "op_edit": [{"subject_id": "photo", "op_version": "v", "edit_ids": [edit["edit_id"] for edit in edits]}],
        "datasets": [{"name": "made", "version": 1, "digest": "d", "rows": len(edits)}],
        "dataset_rows": [{"name": "made", "version": 1, "row_id": edit["edit_id"], "task": "edit", "image_id": edit["target_image_id"],
                          "source_image_id": edit["source_image_id"], "text": edit["instruction"], "edit_type": edit["edit_type"],
                          "weight": 1.0, "split": "train"} for edit in edits],
    })  # fmt: skip
    lake.append(tables)
    record_cutouts(lake, CompositeSettings(cutouts=root), DigestCache(tmp_path / "digests.json"))
    return lake


def test_a_publication_keeps_to_the_licences_of_what_was_pasted(composites: Lake, tmp_path: Path) -> None:
    dataset = open_dataset(composites, "made")
    names = {row["edit_id"]: set() for row in composites.query("SELECT edit_id FROM edits").to_pylist()}
    for row in composites.query("SELECT edit_id, name FROM edit_cutouts").to_pylist():
        names[row["edit_id"]].add(row["name"])
    published = select_rows(composites, dataset, False)
    kept = {row["row_id"]: row for row in published.rows.to_pylist()}
    assert set(kept) == {edit for edit, parts in names.items() if "cup.png" not in parts} and 0 < len(kept) < len(names)
    for edit, row in kept.items():
        assert row["licence"] == ("GPL-2.0" if "hat.png" in names[edit] else "CC-BY") and row["source"] == "own"
        assert row["made_of"].startswith("photo (CC-BY-4.0); ") and all(part in row["made_of"] for part in names[edit])
    assert published.left_out == {("unknown", "no source states a licence that is known"): len(names) - len(kept)}
    publish(composites, "made", None, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| stamps | GPL-2 |" in card and "`made_of` names each with its own" in card
    front = card.split("---\n")[1]
    assert "gpl-2.0" in front and "cc-by-4.0" in front
    everything = select_rows(composites, dataset, True)
    assert len(everything.rows) == len(names) and ("stamps", "") in everything.pasted


def test_a_composite_of_unknown_cutouts_is_not_published(composites: Lake) -> None:
    composites.write(lambda connection: connection.execute("DELETE FROM edit_parts") and None)
    dataset = open_dataset(composites, "made")
    assert row_materials(composites, dataset.rows) == [[Material("unknown", "a cut-out", "")]] * len(dataset)
    with pytest.raises(DatasetError, match=r"may be published: \d+ unknown .* of cut-outs refresh.composite.licence"):
        select_rows(composites, dataset, False)


def test_a_forgotten_photo_takes_composites_along_of_which_both_pictures_were_made(composites: Lake) -> None:
    edits = composites.query("SELECT source_image_id, target_image_id FROM edits").to_pylist()
    pictures = {image_id for edit in edits for image_id in edit.values()}
    assert any("photo" not in edit.values() for edit in edits)
    planned = forget(composites, ["photo"], "asked to", dry_run=True)
    assert set(planned.images) == pictures | {"photo"} and planned.rows["edits"] == len(edits)
