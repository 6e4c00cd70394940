"""What is forgotten is gone from tables, files, caches and time travel, stays away, and takes nothing else with it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dreamlite_data import erasure, executors, refresh, takedown
from dreamlite_data.dataset import open_dataset, read_images
from dreamlite_data.lake import Lake, LakeError
from dreamlite_data.settings import RefreshSettings
from dreamlite_data.takedown import finish_takedowns, forget
from dreamlite_data.tombstones import pixel_digest
from tests.dreamlite_data.conftest import build, contents, small_settings

OWN_CAPTION = "a very particular person at the lake house in 1987"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RefreshSettings]:
    """A lake with a few scenes and photos, and a folder of two own pictures, the second in two encodings."""
    root = tmp_path_factory.mktemp("takedown")
    own = root / "own"
    own.mkdir()
    for name, colour in (("private", (200, 30, 40)), ("other", (20, 90, 200))):
        picture = Image.effect_noise((96, 96), 90).convert("RGB")
        picture.paste(colour, (20, 20, 60, 60))
        picture.save(own / f"{name}.png")
        if name == "other":
            picture.save(own / "other_again.png", compress_level=1)
        (own / f"{name}.txt").write_text(OWN_CAPTION if name == "private" else "a blue square")
    settings = small_settings(
        scenes={"t2i_rows": 20, "edit_rows": 16, "shard_rows": 20, "fault_share": 0.2}, photos={"max_px": 96, "edits_per_image": 1},
        extra_sources=({"name": "own", "kind": "folder", "path": own, "licence": "CC0-1.0"},), executor="local", workers=1,
    )  # fmt: skip
    build(Lake(root / "lake"), settings)
    return root, settings


@pytest.fixture
def opened(template: tuple[Path, RefreshSettings], tmp_path: Path) -> Lake:
    shutil.copytree(template[0] / "lake", tmp_path / "lake")
    return Lake(tmp_path / "lake")


@dataclasses.dataclass(frozen=True)
class Forgotten:
    """A lake in which one image was forgotten, and what was known before."""

    lake: Lake
    image_id: str
    payload: bytes
    before: dict[str, list]
    snapshots: set[int]
    said: takedown.Takedown
    done: takedown.Takedown


COMPARED = ["images", "provenance", "captions", "edits", "op_quality", "op_caption", "op_duplicates", "dataset_rows", "op_ingest"]


@pytest.fixture(scope="module")
def forgotten(template: tuple[Path, RefreshSettings], tmp_path_factory: pytest.TempPathFactory) -> Forgotten:
    """Tests may look, and run a refresh that has nothing to do."""
    root = tmp_path_factory.mktemp("forgotten") / "lake"
    shutil.copytree(template[0] / "lake", root)
    lake = Lake(root)
    image_id = private_id(lake)
    payload = read_images(lake, [image_id])[image_id]
    assert len(set(holding(lake, payload, OWN_CAPTION))) > 2  # the scan finds them while they are there
    write_caches(lake, image_id, payload)
    (lake.root / "reports").mkdir()
    (lake.root / "reports" / "policy-t2i.html").write_text(f"<figure>{OWN_CAPTION}</figure>")
    lake.append({"op_download": [{"subject_id": f"https://a.example/{name}", "op_version": "v", "sha256": sha256, "size_bytes": 9}
                                 for name, sha256 in (("private", original_of(lake, image_id)), ("other", "0" * 64))]})  # fmt: skip
    before, seen = contents(lake, COMPARED), snapshots(lake)
    said = forget(lake, [image_id], "the person asked", dry_run=True)
    assert snapshots(lake) == seen and lake.count("tombstones") == 0 and said.proof is None
    return Forgotten(lake, image_id, payload, before, seen, said, forget(lake, [image_id], "the person asked"))


def write_caches(lake: Lake, image_id: str, payload: bytes) -> None:
    """Files of every kind of cache; those that end in '_goes' hold something of the image."""
    for name, content in (
        ("cache/responses/ab/one_goes.json", json.dumps({"inputs": [image_id]}).encode()),
        ("cache/responses/ab/two.json", b'{"inputs": ["x"]}'),
        ("cache/states-1/part_goes.safetensors", b"opaque"), ("cache/latents-1/part_goes.safetensors", image_id.encode()),
        ("cache/latents-1/other.safetensors", b"0" * 64), ("candidates/t2i_goes.parquet", b"opaque"), ("downloads/ab/file_goes", payload),
        ("downloads/ab/other", b"other"),
    ):  # fmt: skip
        (lake.files / name).parent.mkdir(parents=True, exist_ok=True)
        (lake.files / name).write_bytes(content)


def original_of(lake: Lake, image_id: str) -> str:
    return lake.query("SELECT original_sha256 AS id FROM provenance WHERE image_id = $i", {"i": image_id})["id"][0].as_py()


def snapshots(lake: Lake) -> set[int]:
    return set(lake.query("SELECT snapshot_id FROM ducklake_snapshots('lake')")["snapshot_id"].to_pylist())


def private_id(lake: Lake) -> str:
    return lake.query("SELECT image_id FROM op_ingest WHERE subject_id = 'own/private.png'")["image_id"][0].as_py()


def holding(lake: Lake, payload: bytes, *texts: str) -> list[str]:
    """Files below the lake, but for its sources, that hold the bytes raw or decoded, or one of the texts in any column."""
    found = []
    for path in sorted(item for item in lake.root.rglob("*") if item.is_file() and lake.files / "sources" not in item.parents):
        content = path.read_bytes()
        if payload in content or any(text.encode() in content for text in texts):
            found.append(path.name)
        if path.suffix == ".parquet":
            for column in pq.read_table(path).columns:
                values = column.to_pylist()
                if payload in values or any(text in values for text in texts):
                    found.append(path.name)
    return found


# --- gone ------------------------------------------------------------------------------------------------------------


def test_no_file_holds_the_bytes_or_the_caption_of_a_forgotten_image(forgotten: Forgotten) -> None:
    lake, done = forgotten.lake, forgotten.done
    assert holding(lake, forgotten.payload, OWN_CAPTION) == []
    stored = lake.query("SELECT * FROM takedowns").to_pylist()
    assert [row["image_id"] for row in stored] == [forgotten.image_id] and stored[0]["proof"] == done.proof and len(done.proof) == 64
    assert stored[0]["rows_removed"] == sum(done.rows.values()) and stored[0]["reason"] == "the person asked"


def test_every_other_row_stays_as_it_was(forgotten: Forgotten) -> None:
    after, gone = contents(forgotten.lake, COMPARED), {"own/private.png", *forgotten.done.images}
    for table, before in forgotten.before.items():
        rest = [row for row in before if gone.isdisjoint(value for value in row.values() if isinstance(value, str))]
        assert [row for row in after[table] if row.get("version", 1) == 1 and row.get("error") != "forgotten"] == rest, table
        assert len(before) > len(rest) or table in ("edits", "dataset_rows"), table
    failed = [row for row in after["op_ingest"] if row["error"] == "forgotten"]
    assert [row["subject_id"] for row in failed] == ["own/private.png"] and failed[0]["image_id"] is None
    assert "the person asked" in failed[0]["detail"]


def test_a_url_that_brought_it_is_not_asked_again(forgotten: Forgotten) -> None:
    rows = forgotten.lake.query("SELECT sha256, error, detail, permanent FROM op_download ORDER BY subject_id DESC").to_pylist()
    assert (rows[0]["sha256"], rows[0]["error"], rows[0]["permanent"]) == (None, "forgotten", True) and "the person asked" in rows[0][
        "detail"
    ]
    assert (rows[1]["sha256"], rows[1]["error"]) == ("0" * 64, None)


def test_a_dry_run_had_said_the_same(forgotten: Forgotten) -> None:
    said, done = forgotten.said, forgotten.done
    assert (said.images, said.rows, said.files_rewritten, said.datasets) == (done.images, done.rows, done.files_rewritten, done.datasets)


def test_snapshots_that_saw_it_are_expired_and_earlier_ones_stay(forgotten: Forgotten) -> None:
    left = snapshots(forgotten.lake)
    assert forgotten.snapshots - left == set(forgotten.done.expired_snapshots) & forgotten.snapshots
    assert left & forgotten.snapshots and min(forgotten.done.expired_snapshots) > min(left)
    with pytest.raises(duckdb.Error, match="(?i)snapshot"):
        forgotten.lake.query(f"SELECT count(*) FROM images AT (VERSION => {forgotten.done.expired_snapshots[0]})")


def test_no_contact_sheet_shows_it(forgotten: Forgotten) -> None:
    assert not list((forgotten.lake.root / "reports").iterdir())


def test_caches_that_hold_something_of_it_are_deleted_and_others_stay(forgotten: Forgotten) -> None:
    files = [path for name in ("cache", "candidates", "downloads") for path in (forgotten.lake.files / name).rglob("*") if path.is_file()]
    assert forgotten.done.cached_files >= 5 and sorted(path.name for path in files) == ["other", "other.safetensors", "two.json"]


def test_a_refresh_after_a_takedown_has_nothing_to_do(forgotten: Forgotten, template: tuple[Path, RefreshSettings]) -> None:
    assert refresh.ingest(forgotten.lake, template[1], executors.local())["pending"] == 0
    again = refresh.measure(forgotten.lake, template[1], executors.local(), ["quality", "edit", "caption", "verify"])
    assert set(again.values()) == {0}


def test_an_unknown_image_or_no_reason_is_refused(forgotten: Forgotten) -> None:
    with pytest.raises(LakeError, match="no image f00: it is not in it"):
        forget(forgotten.lake, ["f00"], "asked")
    with pytest.raises(LakeError, match="needs a reason"):
        forget(forgotten.lake, [forgotten.image_id], " ")
    with pytest.raises(LakeError, match="was forgotten before"):
        forget(forgotten.lake, [forgotten.image_id], "asked")


def test_what_operators_made_from_an_image_goes_with_it_and_other_datasets_get_no_new_version(opened: Lake) -> None:
    row = opened.query(
        "SELECT row_id, source_image_id, image_id FROM dataset_rows WHERE name = 'photo_edits' ORDER BY row_id LIMIT 1"
    ).to_pylist()[0]
    payloads = read_images(opened, [row["source_image_id"], row["image_id"]])
    done = forget(opened, [row["source_image_id"]], "asked")
    assert row["image_id"] in done.derived
    for payload in payloads.values():
        assert holding(opened, payload) == []
    versions = {name: open_dataset(opened, name).version for name in ("t2i", "edit", "photos", "photo_edits")}
    assert versions["photo_edits"] == 2 and versions["t2i"] == versions["edit"] == 1
    assert row["row_id"] not in open_dataset(opened, "photo_edits").rows["row_id"].to_pylist()
    assert row["row_id"] not in open_dataset(opened, "photo_edits", 1).rows["row_id"].to_pylist()
    old = opened.query("SELECT version, rows, parent, digest FROM datasets WHERE name = 'photo_edits' ORDER BY version").to_pylist()
    assert old[1]["parent"] == 1 and old[1]["rows"] == old[0]["rows"] - 1 == len(open_dataset(opened, "photo_edits"))
    assert "photo_edits@1" in done.datasets and "photo_edits@2" in done.new_versions


def test_forgetting_the_target_of_a_made_edit_takes_the_edit_but_not_the_photo(opened: Lake) -> None:
    row = opened.query("SELECT source_image_id, image_id FROM dataset_rows WHERE name = 'photo_edits' ORDER BY row_id LIMIT 1").to_pylist()[
        0
    ]
    done = forget(opened, [row["image_id"]], "asked")
    assert done.images == [row["image_id"]]
    assert read_images(opened, [row["source_image_id"]])


def test_checkpoints_that_learned_from_it_are_listed(opened: Lake) -> None:
    name = opened.query("SELECT name FROM dataset_rows WHERE row_id = 'own/private.png'")["name"].to_pylist()
    assert name == []  # no packaged policy takes it, so one of our own does
    image_id = private_id(opened)
    opened.append({
        "datasets": [{"name": "mine", "version": 1, "digest": "d", "policy_digest": "p", "rows": 1}],
        "dataset_rows": [{"name": "mine", "version": 1, "row_id": "own/private.png", "task": "generate", "image_id": image_id,
                          "text": OWN_CAPTION}],
        "lineage": [
            {"child_kind": "checkpoint", "child_id": "t2i-1", "parent_kind": "dataset", "parent_id": "mine@1", "role": "trained_on"},
            {"child_kind": "checkpoint", "child_id": "dmd2-1", "parent_kind": "checkpoint", "parent_id": "t2i-1", "role": "started_from"},
            {"child_kind": "artifact", "child_id": "phone", "parent_kind": "checkpoint", "parent_id": "dmd2-1", "role": "exported_from"},
            {"child_kind": "checkpoint", "child_id": "clean", "parent_kind": "dataset", "parent_id": "t2i@1", "role": "trained_on"},
        ],
    })  # fmt: skip
    done = forget(opened, [image_id], "asked")
    assert done.checkpoints == ["dmd2-1", "phone", "t2i-1"]
    assert len(open_dataset(opened, "mine")) == 0 and open_dataset(opened, "mine").version == 2


def test_near_takes_the_whole_group(opened: Lake) -> None:
    group = opened.query(
        "SELECT group_id, list(image_id ORDER BY image_id) AS ids FROM duplicates GROUP BY group_id ORDER BY group_id"
    ).to_pylist()[0]
    assert len(group["ids"]) == 2 and forget(opened, group["ids"][:1], "asked", dry_run=True).images == group["ids"][:1]
    assert set(forget(opened, group["ids"][:1], "asked", near=True).images) == set(group["ids"])


# --- the proof can fail ----------------------------------------------------------------------------------------------


def test_a_row_that_is_left_anywhere_breaks_the_proof(opened: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    image_id = private_id(opened)
    real = takedown._affected
    monkeypatch.setattr(takedown, "_affected", lambda *a: [file for file in real(*a) if file.table != "captions"])
    with pytest.raises(LakeError, match="not finished.*captions"):
        forget(opened, [image_id], "asked")
    assert opened.query("SELECT proof FROM takedowns")["proof"].to_pylist() == [None]


def test_text_in_the_catalogs_statistics_breaks_the_proof(opened: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "\x01 first of all in any order"
    other = opened.query("SELECT image_id FROM op_ingest WHERE subject_id = 'own/other.png'")["image_id"][0].as_py()
    opened.append({"captions": [{"caption_id": "c", "image_id": other, "text": words}]})
    monkeypatch.setattr(erasure, "_narrow_statistics", lambda lake: None)
    with pytest.raises(LakeError, match="catalog.sqlite"):
        forget(opened, [other], "asked")
    monkeypatch.undo()
    assert finish_takedowns(opened)[0].left == []


def test_a_takedown_that_was_cut_off_is_finished_by_the_next(opened: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    image_id = private_id(opened)
    payload = read_images(opened, [image_id])[image_id]
    monkeypatch.setattr(erasure, "_expire", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        forget(opened, [image_id], "asked")
    assert holding(opened, payload, OWN_CAPTION) and opened.query("SELECT proof FROM takedowns")["proof"].to_pylist() == [None]
    monkeypatch.undo()
    other = opened.query("SELECT image_id FROM op_ingest WHERE subject_id = 'own/other.png'")["image_id"][0].as_py()
    forget(opened, [other], "asked")
    assert holding(opened, payload, OWN_CAPTION) == [] and None not in opened.query("SELECT proof FROM takedowns")["proof"].to_pylist()


# --- stays away ------------------------------------------------------------------------------------------------------


def test_a_forgotten_image_that_comes_back_is_refused_with_the_reason(
    opened: Lake, template: tuple[Path, RefreshSettings], tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(template[0] / "own", own)
    settings = template[1].model_copy(update={"extra_sources": (template[1].extra_sources[0].model_copy(update={"path": own}),)})
    image_id = private_id(opened)
    forget(opened, [image_id], "the person asked")
    with Image.open(own / "private.png") as picture:
        picture.load()
    picture.save(own / "recoded.png", compress_level=1)  # other bytes, same pixels
    shutil.copy(own / "private.png", own / "again.png")
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(own / "mirrored.png")  # another picture of the same size
    (own / "again.txt").write_text(OWN_CAPTION)
    build(opened, settings)
    rows = {
        row["subject_id"]: row
        for row in opened.query("SELECT subject_id, error, detail, image_id FROM op_ingest WHERE source = 'own'").to_pylist()
    }
    for name in ("private", "again", "recoded"):
        assert rows[f"own/{name}.png"]["error"] == "forgotten" and "the person asked" in rows[f"own/{name}.png"]["detail"], name
    assert rows["own/mirrored.png"]["error"] is None and rows["own/other.png"]["error"] is None
    assert opened.query("SELECT count(*) AS n FROM images WHERE image_id = $i", {"i": image_id})["n"][0].as_py() == 0
    assert opened.query("SELECT count(*) AS n FROM captions WHERE text = $t", {"t": OWN_CAPTION})["n"][0].as_py() == 0
    said = opened.query("SELECT rule FROM why_dropped WHERE row_id = 'own/again.png' AND dataset = 't2i'")["rule"].to_pylist()
    assert said == ["ingested"]


def test_pixel_digests_see_shape_and_every_pixel() -> None:
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    changed = pixels.copy()
    changed[3, 5, 2] ^= 1
    assert len({pixel_digest(item) for item in (pixels, changed, pixels.reshape(6, 4, 3), pixels.reshape(2, 12, 3))}) == 4
    assert pixel_digest(pixels.copy()) == pixel_digest(pixels)
