"""Plain JPEG files are decoded without Pillow's look at them, and nothing that needs that look ever passes as plain."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from dreamlite_data import images
from dreamlite_data.images import BadImage, Decoded, decode
from dreamlite_data.settings import IngestSettings


def _picture(mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(0).normal(size=(48, 60, 3)).cumsum(0).cumsum(1)
    return Image.fromarray((255 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)).convert(mode)


def _jpeg(mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    _picture(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _jpeg(exif=exif)


def _with_profile() -> bytes:
    return _jpeg(icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes())


BARE = {"plain": _jpeg(), "progressive": _jpeg(progressive=True), "commented": _jpeg(comment=b"a \xff\xda word"),
        "fine": _jpeg(quality=100, subsampling=0), "optimised": _jpeg(optimize=True), "restarts": _jpeg(restart_marker_blocks=2)}  # fmt: skip
OTHERS = {"turned": _turned(), "profile": _with_profile(), "grey": _jpeg("L"), "cmyk": _jpeg("CMYK"),
          "two": _jpeg() + _jpeg()}  # fmt: skip
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
OTHERS["adobe rgb"] = BARE["plain"][:2] + ADOBE + BARE["plain"][2:]


def _outcome(payload: bytes) -> tuple:
    try:
        found: Decoded = decode(payload)
    except BadImage as bad:
        return ("bad", bad.reason)
    return found.pixels.tobytes(), found.pixels.shape, found.mime, found.plain, found.notes


@pytest.mark.parametrize("name", [*BARE, *OTHERS])
def test_both_paths_say_the_same_of_every_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    payload = {**BARE, **OTHERS}[name]
    assert (images._bare_jpeg_size(payload) == (60, 48)) is (name in BARE or name == "two")
    quick = _outcome(payload)
    monkeypatch.setattr(images, "_bare_jpeg_size", lambda payload: None)
    assert quick == _outcome(payload)


def test_both_paths_say_the_same_of_damaged_files(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    payload = BARE["plain"]
    damaged = [payload[:cut] for cut in range(0, len(payload), 37)]
    for _ in range(150):
        broken = bytearray(payload)
        for place in rng.integers(0, len(broken), 3):
            broken[place] = rng.integers(256)
        damaged.append(bytes(broken))
    quick = [_outcome(item) for item in damaged]
    monkeypatch.setattr(images, "_bare_jpeg_size", lambda payload: None)
    slow = [_outcome(item) for item in damaged]
    assert quick == slow and sum(outcome[0] == "bad" for outcome in slow) > 30


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *given, **named: pytest.fail("decoded"))
    with pytest.raises(BadImage, match="60 x 48 px is over the limit of 50 px a side") as refused:
        decode(BARE["plain"], IngestSettings.model_construct(max_side_px=50, max_image_px=10_000))
    assert refused.value.reason == "too_large"
