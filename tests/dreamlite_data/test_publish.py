"""A publication opens elsewhere with the rows of its version, keeps what may not be passed on, and appears whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from dreamlite_data import publish as publishing
from dreamlite_data.dataset import DatasetError, open_dataset, read_images
from dreamlite_data.lake import Lake
from dreamlite_data.publish import publish
from dreamlite_data.publishing import webdataset
from dreamlite_data.publishing.licences import find_licence, row_licences
from dreamlite_data.publishing.rows import cut_shards
from dreamlite_data.settings import IngestSettings
from dreamlite_data.sources import WebDatasetSource, read
from dreamlite_data.sources.base import DigestCache

SMALL_SHARD = 40_000  # so that these few rows fill several shards


def load(folder: Path, cache: Path, *config: str):
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset(str(folder), *config, cache_dir=str(cache))


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def test_load_dataset_opens_a_publication_with_decoded_images_and_the_rows_of_the_version(built: Lake, tmp_path: Path) -> None:
    manifest = publish(built, "edit", None, tmp_path / "edit", shard_bytes=SMALL_SHARD)
    opened = load(tmp_path / "edit", tmp_path / "cache")
    rows = {row["row_id"]: row for row in open_dataset(built, "edit").rows.to_pylist()}
    found = {row["row_id"]: (split, row) for split in opened for row in opened[split]}
    assert found.keys() == rows.keys() and manifest["rows"] == len(rows)
    stored = read_images(built, [image for row in rows.values() for image in (row["image_id"], row["source_image_id"])])
    for row_id, (split, row) in found.items():
        assert split == rows[row_id]["split"] and row["text"] == rows[row_id]["text"] and row["licence"] == "CC0-1.0"
        for column, image_id in (("image", rows[row_id]["image_id"]), ("source_image", rows[row_id]["source_image_id"])):
            assert row[column].tobytes() == Image.open(io.BytesIO(stored[image_id])).tobytes()
        assert row["mask"].tobytes() == rows[row_id]["edit_mask"]
    assert len(list((tmp_path / "edit" / "data").glob("train-*-of-*.parquet"))) > 1


def test_two_tasks_are_two_configurations(built: Lake, tmp_path: Path) -> None:
    publish(built, "rl", None, tmp_path / "rl")
    assert "source_image" in load(tmp_path / "rl", tmp_path / "cache", "edit")["train"].features
    assert "source_image" not in load(tmp_path / "rl", tmp_path / "cache", "generate")["train"].features


def test_shards_are_laid_out_as_the_hub_wants_them(built: Lake, tmp_path: Path) -> None:
    publish(built, "t2i", None, tmp_path / "t2i")
    for path in (tmp_path / "t2i" / "data").glob("*.parquet"):
        file = pq.ParquetFile(path)
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        assert all(group.num_rows <= 100 and group.total_byte_size <= 16 * 2**20 + 2**20 for group in groups)
        image = groups[0].column(0)
        assert image.path_in_schema == "image.bytes" and image.compression == "UNCOMPRESSED" and not image.is_stats_set
        assert groups[0].column(2).has_column_index and groups[0].column(2).compression == "ZSTD"
        assert json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]["image"] == {"_type": "Image"}


def test_the_card_says_how_many_why_and_under_which_licence(built: Lake, tmp_path: Path) -> None:
    publish(built, "photos", None, tmp_path / "photos")
    text = (tmp_path / "photos" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert set(front["license"]) == {"cc0-1.0", "cc-by-4.0", "unlicense"} and front["task_categories"] == ["text-to-image"]
    rows = open_dataset(built, "photos").rows
    info = {split["name"]: split["num_examples"] for split in front["dataset_info"]["splits"]}
    left_out = json.loads((tmp_path / "photos" / "manifest.json").read_text())["left_out"]
    assert left_out[0]["licence"] == "unknown" and sum(info.values()) + left_out[0]["rows"] == len(rows)
    for rule in built.query("SELECT rule, rows_in, rejected, rows_out FROM funnel WHERE dataset = 'photos'").to_pylist():
        assert f"| {rule['rule']} |" in text and f"| {rule['rows_in']} | {rule['rejected']} | {rule['rows_out']} |" in text
    assert all((tmp_path / "photos" / name).is_file() for name in re.findall(r"\((assets/[^)]+)\)", text))


# --- WebDataset ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t2i", "edit"])
def test_our_own_source_reads_a_webdataset_publication_back(built: Lake, tmp_path: Path, name: str) -> None:
    publish(built, name, None, tmp_path / name, "webdataset", shard_bytes=SMALL_SHARD)
    source = WebDatasetSource("back", tmp_path / name)
    units = list(source.units(DigestCache(tmp_path / "digests.json")))
    records = [record for unit in units for record in read(unit, IngestSettings())]
    assert len(units) > 1 and not any(record.error or record.notes for record in records)
    rows = {row["row_id"]: row for row in open_dataset(built, name).rows.to_pylist()}
    assert len(records) == len(rows)
    for record in records:
        row = rows[record.metadata["row_id"]]
        images = {role: hashlib.sha256(payload).hexdigest() for role, payload in record.images.items()}
        if name == "edit":
            assert images == {"source": row["source_image_id"], "target": row["image_id"]} and record.task == "edit"
            assert record.metadata["instruction"] == row["text"] and record.metadata["edit_type"] == row["edit_type"]
        else:
            assert images == {"": row["image_id"]} and record.caption == row["text"]
        assert record.metadata["licence"] == "CC0-1.0"


# --- licences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stated", "name", "may"), [
    ("CC-BY-NC-ND-4.0", "CC-BY-NC-ND", False), ("cc_by_nd 4.0", "CC-BY-ND", False), ("CC-BY-4.0", "CC-BY", True),
    ("CC BY-SA 3.0", "CC-BY-SA", True), ("public domain (NASA)", "Public domain", True), ("MIT", "MIT", True),
    ("mitigated", "unknown", False), (None, "unknown", False), ("see the README", "unknown", False),
])  # fmt: skip
def test_a_stated_licence_is_recognised_or_unknown(stated: str | None, name: str, may: bool) -> None:
    found = find_licence(stated)
    assert (found.name, found.publish) == (name, may)


def test_a_made_image_stands_under_the_licence_of_what_it_was_made_from(built: Lake) -> None:
    rows = open_dataset(built, "photo_edits").rows
    of_source = {
        r["image_id"]: r["licence"] for r in built.query("SELECT image_id, licence FROM provenance WHERE source LIKE 'photos%'").to_pylist()
    }
    assert row_licences(built, rows) == [[of_source[image_id]] for image_id in rows["source_image_id"].to_pylist()]
    nowhere = pa.table({name: pa.array(["absent"]) for name in ("row_id", "image_id", "source_image_id")})
    assert row_licences(built, nowhere) == [[]]


def restricted(built: Lake, folder: Path, licence: str | None) -> Lake:
    """A lake with two rows: one CC0, one under `licence`."""
    lake = Lake(folder)
    ids = open_dataset(built, "t2i").rows["image_id"].to_pylist()[:2]
    payloads = read_images(built, ids)
    lake.append({
        "images": [{"image_id": i, "bytes": payloads[i], "mime": "image/png", "width": 64, "height": 64, "size_bytes": len(payloads[i])}
                   for i in sorted(ids)],
        "provenance": [{"image_id": ids[0], "record_id": "a/1", "source": "a", "licence": "CC0-1.0"},
                       {"image_id": ids[1], "record_id": "a/2", "source": "a", "licence": licence}],
        "datasets": [{"name": "own", "version": 1, "digest": "d", "rows": 2}],
        "dataset_rows": [{"name": "own", "version": 1, "row_id": f"a/{n + 1}", "task": "generate", "image_id": i, "text": "t",
                          "weight": 1.0, "split": "train"} for n, i in enumerate(ids)],
    })  # fmt: skip
    return lake


@pytest.mark.parametrize("licence", ["CC-BY-NC-ND-4.0", None])
def test_what_may_not_be_passed_on_stays_out_and_is_counted_unless_asked_for(built: Lake, tmp_path: Path, licence: str | None) -> None:
    lake = restricted(built, tmp_path / "lake", licence)
    manifest = publish(lake, "own", 1, tmp_path / "out")
    assert manifest["rows"] == 1 and [item["rows"] for item in manifest["left_out"]] == [1]
    assert manifest["left_out"][0]["licence"] in (tmp_path / "out" / "README.md").read_text()
    payload = read_images(lake, open_dataset(lake, "own").rows["image_id"].to_pylist()[1:])
    assert not any(next(iter(payload.values())) in file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file())
    everything = publish(lake, "own", 1, tmp_path / "all", include_restricted=True)
    assert everything["rows"] == 2 and everything["left_out"] == []


def test_a_dataset_of_which_nothing_may_be_published_is_refused(built: Lake, tmp_path: Path) -> None:
    lake = restricted(built, tmp_path / "lake", None)
    lake.write(lambda connection: connection.execute("UPDATE provenance SET licence = 'all rights reserved'"))
    with pytest.raises(DatasetError, match="no row of own@1 may be published: 2 All rights reserved"):
        publish(lake, "own", None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- whole, and the same again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", publishing.FORMATS)
def test_publishing_twice_gives_the_same_bytes_and_the_manifest_knows_them(built: Lake, tmp_path: Path, format_: str) -> None:
    first = publish(built, "photo_edits", None, tmp_path / "a", format_, shard_bytes=SMALL_SHARD)
    second = publish(built, "photo_edits", None, tmp_path / "b", format_, shard_bytes=SMALL_SHARD)
    assert first == second
    listed = {item["path"]: item["sha256"] for item in first["files"]}
    on_disk = {file.relative_to(tmp_path / "a").as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
               for file in (tmp_path / "a").rglob("*") if file.is_file()}  # fmt: skip
    assert on_disk.keys() - listed.keys() == {"manifest.json"} and all(on_disk[path] == sha256 for path, sha256 in listed.items())


def test_a_publish_that_is_cut_off_leaves_no_folder_and_the_next_one_is_whole(
    built: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = webdataset.write_tar, []

    def fail_at_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(webdataset, "write_tar", fail_at_second)
    with pytest.raises(KeyboardInterrupt):
        publish(built, "t2i", None, tmp_path / "out", "webdataset", shard_bytes=SMALL_SHARD)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / ".out.draft").mkdir()  # as a kill -9 leaves it
    (tmp_path / ".out.draft" / "torn").write_text("x")
    publish(built, "t2i", None, tmp_path / "out", "webdataset", shard_bytes=SMALL_SHARD)
    assert [item.name for item in tmp_path.iterdir()] == ["out"] and not (tmp_path / "out" / "torn").exists()


def test_a_folder_that_is_there_is_never_written_over(built: Lake, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(DatasetError, match="is there already"):
        publish(built, "t2i", None, tmp_path / "mine")
    assert [item.name for item in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(DatasetError, match="no format 'lance'"):
        publish(built, "t2i", None, tmp_path / "new", "lance")
    with pytest.raises(DatasetError, match="has no version 9"):
        publish(built, "t2i", 9, tmp_path / "new")


def test_shards_hold_every_row_once_in_order_and_respect_their_size() -> None:
    rows = pa.table({"row_id": [f"{n:03d}" for n in range(50)], "task": ["generate"] * 50, "split": ["train", "heldout"] * 25,
                     "size_bytes": [(n * 37) % 400 for n in range(50)]})  # fmt: skip
    shards = cut_shards(rows, 1000)
    assert [shard.split for shard in shards] == sorted((shard.split for shard in shards), key=lambda name: name != "train")
    for split in ("train", "heldout"):
        of_split = [shard for shard in shards if shard.split == split]
        assert [shard.index for shard in of_split] == list(range(of_split[0].count)) and of_split[0].count == len(of_split) > 2
        assert [row for shard in of_split for row in shard.rows["row_id"].to_pylist()] == [
            row["row_id"] for row in rows.to_pylist() if row["split"] == split
        ]
    assert all(sum(shard.rows["size_bytes"].to_pylist()) <= 1000 for shard in shards)
