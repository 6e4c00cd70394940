"""Whatever lies in a source, every file ends as a clean image or as a row that says why not, and none stops the others.
The same zoo is planted in a folder and in a tar, and each animal is accounted for."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from dreamlite_data import executors, images, refresh
from dreamlite_data.dataset import read_images
from dreamlite_data.lake import Lake
from dreamlite_data.settings import RefreshSettings

SIZE = (48, 32)  # width, height


def _pixels() -> np.ndarray:
    grid = np.mgrid[0 : SIZE[1], 0 : SIZE[0]]
    return np.stack([grid[0] * 7, grid[1] * 5, (grid[0] + grid[1]) * 3], axis=-1).astype(np.uint8)


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _png_of_size(width: int, height: int) -> bytes:
    """A PNG header that promises a huge image, with next to no data behind it."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def _png_16_bit() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_pixels()[..., 0].astype(np.uint16) * 257).save(buffer, "PNG")
    return buffer.getvalue()


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encode(Image.fromarray(_pixels()), "JPEG", quality=95, exif=exif)


def _palette_with_alpha() -> bytes:
    image = Image.fromarray(_pixels()).quantize(16)
    return _encode(image, "PNG", transparency=0)


def _zoo() -> dict[str, tuple[bytes, str | None]]:
    """Name -> (bytes, the reason it is refused with; None where it must become a clean image)."""
    plain = Image.fromarray(_pixels())
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    jpeg = _encode(noise, "JPEG", quality=95)
    frames = [Image.fromarray(np.full((32, 48, 3), shade, np.uint8)) for shade in (10, 200)]
    return {
        "plain.jpg": (_encode(plain, "JPEG", quality=95), None),
        "plain.png": (_encode(plain, "PNG"), None),
        "plain.webp": (_encode(plain, "WEBP", lossless=True), None),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.png": (_encode(noise, "PNG")[:4000], "truncated"),
        "endless.png": (_encode(plain, "PNG")[:-12], "truncated"),
        "zero.jpg": (b"", "empty"),
        "text.jpg": (b"<html><body>404 not found</body></html>", "not_an_image"),
        "bomb.png": (_png_of_size(20_000, 20_000), "too_large"),
        "bomb_beyond_pillow.png": (_png_of_size(60_000, 60_000), "too_large"),
        "short.png": (_png_of_size(400, 400), "truncated"),
        "cmyk.jpg": (_encode(plain.convert("CMYK"), "JPEG", quality=95), None),
        "sixteen.png": (_png_16_bit(), None),
        "grey.png": (_encode(plain.convert("L"), "PNG"), None),
        "animated.gif": (_encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), None),
        "animated.webp": (_encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True), None),
        "palette.png": (_palette_with_alpha(), None),
        "alpha.png": (_encode(Image.fromarray(np.dstack([_pixels(), np.zeros((32, 48), np.uint8)])), "PNG"), None),
        "rotated.jpg": (_rotated(), None),
        "bad_profile.jpg": (_encode(plain, "JPEG", quality=95, icc_profile=b"not a profile"), None),
        "lab.tif": (_encode(ImageCms.profileToProfile(plain, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"),
                            "TIFF"), None),
    }  # fmt: skip


def _write_folder(folder: Path) -> dict[str, str | None]:
    folder.mkdir(parents=True)
    expected: dict[str, str | None] = {}
    for name, (payload, reason) in _zoo().items():
        (folder / name).write_bytes(payload)
        (folder / name).with_suffix(".txt").write_text(f"the picture {name}")
        expected[name] = reason
    (folder / "copy.png").write_bytes(_zoo()["plain.png"][0])
    (folder / "copy.txt").write_text("the same bytes again")
    (folder / "latin.png").write_bytes(_encode(Image.fromarray(255 - _pixels()), "PNG"))
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "alone.png").write_bytes(_encode(Image.fromarray(_pixels()[::-1].copy()), "PNG"))
    (folder / "words_only.txt").write_text("no picture beside me")
    (folder / ".hidden.png").write_bytes(b"x")
    (folder / "leaves_the_folder.png").symlink_to("/etc/hostname")
    return expected | {"copy.png": None, "latin.png": None, "alone.png": None, "words_only.txt": "missing_image"}


def _add(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(payload)
    tar.addfile(info, io.BytesIO(payload))


def _write_tars(folder: Path) -> dict[str, str | None]:
    folder.mkdir(parents=True)
    expected: dict[str, str | None] = {}
    with tarfile.open(folder / "zoo.tar", "w") as tar:
        for name, (payload, reason) in _zoo().items():
            stem, suffix = name.split(".")
            _add(tar, f"{stem}_{suffix}.{suffix}", payload)
            _add(tar, f"{stem}_{suffix}.txt", f"the picture {name}".encode())
            expected[f"{stem}_{suffix}"] = reason
        _add(tar, "latin.png", _encode(Image.fromarray(255 - _pixels()), "PNG"))
        _add(tar, "latin.txt", b"caf\xe9")
        _add(tar, "alone.png", _encode(Image.fromarray(_pixels()[::-1].copy()), "PNG"))
        _add(tar, "words_only.txt", b"no picture beside me")
        _add(tar, "surrogate.png", _encode(Image.fromarray(_pixels()[:, ::-1].copy()), "PNG"))
        _add(tar, "surrogate.json", b'{"caption": "\\ud800"}')
        _add(tar, "../../escape.png", _zoo()["plain.png"][0])
        _add(tar, "/absolute.png", _zoo()["plain.png"][0])
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
        good = _encode(Image.fromarray(_pixels()), "PNG")
        _add(tar, "pair.source.png", good)
        _add(tar, "pair.target.png", good[: len(good) // 2])
        _add(tar, "pair.json", json.dumps({"instruction": "do it"}).encode())
        _add(tar, "half.source.png", good)
        _add(tar, "half.json", json.dumps({"instruction": "do it"}).encode())
        _add(tar, "mute.source.png", good)
        _add(tar, "mute.target.png", _encode(Image.fromarray(255 - _pixels()), "PNG"))
    expected |= {
        "latin": None, "alone": None, "words_only": "missing_image", "surrogate": None, "../../escape.png": "unsafe_name",
        "/absolute.png": "unsafe_name", "link.png": "not_a_file", "pair": "truncated", "half": "missing_target",
        "mute": "missing_instruction",
    }  # fmt: skip
    whole = (folder / "zoo.tar").read_bytes()
    (folder / "cut.tar").write_bytes(whole[: len(whole) // 2])
    with tarfile.open(folder / "boundary.tar", "w") as tar:
        _add(tar, "a.png", good)
        _add(tar, "b.png", good)
    with tarfile.open(folder / "boundary.tar") as tar:
        second = tar.getmembers()[1].offset
    payload = (folder / "boundary.tar").read_bytes()
    (folder / "boundary.tar").write_bytes(payload[:second])  # cut exactly between two members
    (folder / "header.tar").write_bytes(payload[:second] + b"\xff" * 512 + payload[second + 512 :])
    (folder / "noise.tar").write_bytes(b"this was never a tar" * 100)
    return expected


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lake, dict[str, str | None], dict[str, str | None], dict]:
    root = tmp_path_factory.mktemp("zoo")
    in_folder, in_tar = _write_folder(root / "folder"), _write_tars(root / "tars")
    settings = RefreshSettings(
        scenes={"t2i_rows": 0, "edit_rows": 0},
        photos={"enabled": False},
        extra_sources=(
            {"name": "zoo_folder", "kind": "folder", "path": root / "folder"},
            {"name": "zoo_tar", "kind": "webdataset", "path": root / "tars"},
        ),
    )
    lake = Lake(root / "lake")
    executor = executors.local()
    counts = refresh.ingest(lake, settings, executor)
    counts |= refresh.measure(lake, settings, executor, ["quality", "caption"])
    return lake, in_folder, in_tar, counts


@pytest.mark.parametrize("source", ["zoo_folder", "zoo_tar"])
def test_every_file_is_accounted_for_with_its_reason(zoo: tuple, source: str) -> None:
    lake, in_folder, in_tar, _ = zoo
    rows = lake.query("SELECT source_key, error FROM current_ingest WHERE source = $s", {"s": source}).to_pylist()
    assert len(rows) == len({row["source_key"] for row in rows})
    assert {row["source_key"]: row["error"] for row in rows} == (in_folder if source == "zoo_folder" else in_tar)


def test_what_is_accepted_is_clean_rgb_and_named_by_its_bytes(zoo: tuple) -> None:
    import hashlib

    lake = zoo[0]
    ids = lake.query("SELECT image_id FROM images")["image_id"].to_pylist()
    assert len(ids) == len(set(ids)) > 10
    for image_id, payload in read_images(lake, ids).items():
        assert hashlib.sha256(payload).hexdigest() == image_id
        with Image.open(io.BytesIO(payload)) as image:
            assert (image.mode, getattr(image, "n_frames", 1), image.getexif().get(0x0112, 1)) == ("RGB", 1, 1)
            image.load()


def test_plain_files_keep_their_bytes_and_odd_ones_say_what_was_done(zoo: tuple) -> None:
    lake = zoo[0]
    rows = lake.query("SELECT source_key, stored, notes, original_sha256, image_id FROM provenance WHERE source = 'zoo_folder'").to_pylist()
    facts = {row["source_key"]: row for row in rows}
    for name in ("plain.jpg", "plain.png", "plain.webp", "bad_profile.jpg"):
        assert (facts[name]["stored"], facts[name]["notes"]) == ("original", None)
        assert facts[name]["original_sha256"] == facts[name]["image_id"]
    said = {"cmyk.jpg": "mode CMYK", "sixteen.png": "mode I;16", "animated.gif": "first of 2 frames", "animated.webp": "first of 2 frames",
            "palette.png": "transparency", "rotated.jpg": "EXIF orientation 6", "grey.png": "mode L", "alpha.png": "transparency"}  # fmt: skip
    for name, words in said.items():
        assert facts[name]["stored"] == "normalised" and words in facts[name]["notes"], name
        assert facts[name]["original_sha256"] != facts[name]["image_id"]


def test_normalised_pixels_are_right(zoo: tuple) -> None:
    zoo_files = _zoo()
    upright = images.decode(zoo_files["rotated.jpg"][0]).pixels
    assert upright.shape == (SIZE[0], SIZE[1], 3)
    assert np.abs(upright.astype(int) - np.rot90(_pixels(), -1).astype(int)).mean() < 4
    sixteen = images.decode(zoo_files["sixteen.png"][0]).pixels
    assert np.array_equal(sixteen, np.repeat(_pixels()[..., :1], 3, axis=2))
    assert (images.decode(zoo_files["alpha.png"][0]).pixels == 255).all()  # fully transparent: white, not the colour behind
    assert np.abs(images.decode(zoo_files["animated.gif"][0]).pixels.astype(int) - 10).max() <= 2
    assert np.abs(images.decode(zoo_files["cmyk.jpg"][0]).pixels.astype(int) - _pixels().astype(int)).mean() < 12


def test_unusable_words_leave_the_image_and_a_note(zoo: tuple) -> None:
    lake = zoo[0]
    rows = lake.query("SELECT source, source_key, caption_id, notes FROM current_ingest").to_pylist()
    notes = {(row["source"], row["source_key"]): row["notes"] for row in rows if row["caption_id"] is None and row["notes"]}
    assert notes[("zoo_folder", "latin.png")] == notes[("zoo_tar", "latin")] == "caption_not_utf8"
    assert notes[("zoo_folder", "alone.png")] == notes[("zoo_tar", "alone")] == "missing_sidecar"
    assert "metadata_invalid" in notes[("zoo_tar", "surrogate")]


def test_an_exact_duplicate_is_two_records_of_one_image(zoo: tuple) -> None:
    lake = zoo[0]
    rows = lake.query("SELECT image_id FROM current_ingest WHERE source_key IN ('plain.png', 'copy.png', 'plain_png')").to_pylist()
    assert len(rows) == 3 and len({row["image_id"] for row in rows}) == 1


def test_damaged_shards_are_quarantined_and_the_rest_goes_on(zoo: tuple) -> None:
    lake, _, _, counts = zoo
    rows = lake.query("SELECT shard, rows, error FROM op_shard WHERE source = 'zoo_tar'").to_pylist()
    broken = {row["shard"]: row["error"] for row in rows if row["error"]}
    assert set(broken) == {"cut.tar", "boundary.tar", "header.tar", "noise.tar"} and counts["quarantined"] == 4
    assert "cut" in broken["boundary.tar"] and "damaged" in broken["header.tar"]
    assert next(row["rows"] for row in rows if row["shard"] == "zoo.tar") == len(zoo[2])
    assert lake.query("SELECT DISTINCT shard FROM current_ingest WHERE source = 'zoo_tar'")["shard"].to_pylist() == ["zoo.tar"]


def test_every_stored_image_could_be_measured(zoo: tuple) -> None:
    lake, _, _, counts = zoo
    assert counts["quality_rows"] == 0  # ingest measured them from its own decode
    looks = lake.query("SELECT count(*) AS n, count(error) AS failed FROM current_quality SEMI JOIN images ON image_id = subject_id")
    assert looks.to_pylist() == [{"n": lake.count("images"), "failed": 0}]
    assert counts["caption_failed"] == 0  # not a scene is an answer, not a failure


def test_a_package_that_accepts_half_images_does_not_change_the_verdict() -> None:
    from PIL import ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        for name in ("truncated.jpg", "truncated.png"):
            with pytest.raises(images.BadImage, match="truncated"):
                images.decode(_zoo()[name][0])
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
