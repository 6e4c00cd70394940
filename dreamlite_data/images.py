"""Turn the bytes of any image file into plain RGB pixels, or say exactly why that cannot be done.
Nothing is decoded before the header says that it is affordable, and half a file is never taken for a whole one."""

from __future__ import annotations

import dataclasses
import io
import struct
import warnings

import numpy as np
import simplejpeg
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from dreamlite_data.settings import IngestSettings

# Formats whose readers are pure parsers: EPS and the like would start other programs.
Image.init()  # registers every reader of this Pillow; which ones it was built with differs
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF") if name in Image.OPEN)
STORED_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
PNG_END = b"IEND\xaeB`\x82"
_ORIENTATION_TAG = 0x0112
_SEGMENT, _FRAME = struct.Struct(">BBH"), struct.Struct(">BHHB")
# Start of frame (baseline, extended, progressive), Huffman and quantisation tables, restart interval, comment, scan: ITU T.81, table B.1.
_BARE_SEGMENTS = frozenset((0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD, 0xFE, 0xDA))


class BadImage(ValueError):
    """Why bytes are no usable image: a short `reason` to group by, and a `detail` for a human."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class Decoded:
    """`pixels` is uint8 [H, W, 3]. `plain` says that the file itself is clean 8-bit RGB and can be kept as it is;
    `notes` name every conversion that was needed where it is not."""

    pixels: np.ndarray
    mime: str
    plain: bool
    notes: tuple[str, ...]


def decode(payload: bytes, limits: IngestSettings | None = None) -> Decoded:
    """Decode a file of unknown kind; raises BadImage."""
    limits = limits or IngestSettings()
    if not payload:
        raise BadImage("empty", "the file has zero bytes")
    size = _bare_jpeg_size(payload)
    if size is not None:
        _refuse_size(*size, limits)
        try:
            return Decoded(simplejpeg.decode_jpeg(payload, "RGB", strict=True), "image/jpeg", True, ())
        except (ValueError, MemoryError):
            pass  # Pillow's path names the reason
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # some packages switch this on for the whole process when imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(payload), formats=FORMATS)
        except UnidentifiedImageError:
            raise BadImage("not_an_image", f"no image format starts with {payload[:12]!r}") from None
        except Image.DecompressionBombError as error:
            raise BadImage("too_large", str(error)) from None
        except Exception as error:
            raise BadImage("broken_header", f"{type(error).__name__}: {error}") from None
        with image:
            return _decode_opened(image, payload, limits)


def _bare_jpeg_size(payload: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG of three 8-bit components whose header holds tables and nothing that could call for a
    conversion (no EXIF, profile or Adobe segment, no second picture); None for everything else. Most files of the web are
    such once they were resized, and need no look by Pillow, which costs a twentieth of the decode."""
    if payload[:2] != b"\xff\xd8":
        return None
    place, size = 2, None
    while place + 4 <= len(payload):
        mark, kind, length = _SEGMENT.unpack_from(payload, place)
        if mark != 0xFF or not (kind in _BARE_SEGMENTS or (kind == 0xE0 and payload[place + 4 : place + 9] == b"JFIF\0")):
            return None
        if kind == 0xDA:
            return size
        if 0xC0 <= kind <= 0xC2:
            if size is not None or length < 8 or place + 10 > len(payload):
                return None
            depth, height, width, components = _FRAME.unpack_from(payload, place + 4)
            if depth != 8 or components != 3 or not width or not height:
                return None
            size = width, height
        place += 2 + length
    return None


def _refuse_size(width: int, height: int, limits: IngestSettings) -> None:
    if max(width, height) > limits.max_side_px or width * height > limits.max_image_px:
        raise BadImage(
            "too_large",
            f"{width} x {height} px is over the limit of {limits.max_side_px} px a side or {limits.max_image_px} px in all",
        )


def _decode_opened(image: Image.Image, payload: bytes, limits: IngestSettings) -> Decoded:
    width, height = image.size
    _refuse_size(width, height, limits)
    if min(width, height) < 1:
        raise BadImage("broken_header", f"{width} x {height} px")
    if image.format == "PNG" and PNG_END not in payload:
        raise BadImage("truncated", "the PNG has no end chunk")  # its pixels may all be there, but the file is cut
    mime = Image.MIME.get(image.format, f"image/{str(image.format).lower()}")
    try:
        notes = _differences_from_plain(image)
        if image.format == "JPEG" and not notes:
            return Decoded(simplejpeg.decode_jpeg(payload, "RGB", strict=True), mime, True, ())
        image.load()
        pixels = np.array(image) if not notes else _normalise(image)
    except (OSError, ValueError, SyntaxError, struct.error, EOFError, ImageCms.PyCMSError) as error:
        text = str(error)
        cut = any(word in text.lower() for word in ("truncat", "premature", "incomplete", "end of file", "unrecognized data", "eof"))
        raise BadImage("truncated" if cut or isinstance(error, EOFError) else "broken_pixels", text or type(error).__name__) from None
    except (MemoryError, Image.DecompressionBombError) as error:
        raise BadImage("too_large", str(error) or "not enough memory to decode") from None
    return Decoded(pixels, mime, not notes, tuple(notes))


def _differences_from_plain(image: Image.Image) -> list[str]:
    """What keeps a file from being stored as it is; empty for a clean 8-bit RGB still image."""
    notes = []
    if image.format not in STORED_AS_THEY_ARE:
        notes.append(f"format {image.format}")
    if getattr(image, "n_frames", 1) > 1:
        notes.append(f"first of {image.n_frames} frames")
    if image.mode != "RGB":
        notes.append(f"mode {image.mode}")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        notes.append("transparency on white")
    if image.format == "PNG" and image.mode == "RGB" and _png_bit_depth(image) == 16:
        notes.append("16 bit")
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    if orientation not in (0, 1):
        notes.append(f"EXIF orientation {orientation}")
    if _foreign_profile(image) is not None:
        notes.append("ICC profile to sRGB")
    return notes


def _png_bit_depth(image: Image.Image) -> int:
    position = image.fp.tell()
    image.fp.seek(24)  # byte 24 of a PNG is the depth in its IHDR chunk
    depth = image.fp.read(1)
    image.fp.seek(position)
    return depth[0] if depth else 8


def _foreign_profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The embedded colour profile where it is readable and not sRGB."""
    raw = image.info.get("icc_profile")
    if not raw:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(raw))
        name = ImageCms.getProfileDescription(profile).lower()
    except Exception:  # a broken profile is ignored, as every viewer does
        return None
    return None if "srgb" in name else profile


def _normalise(image: Image.Image) -> np.ndarray:
    """Any mode, orientation or profile to upright sRGB pixels, uint8 [H, W, 3]; transparency is laid on white."""
    image.seek(0)
    profile = _foreign_profile(image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        deep = np.asarray(image, dtype=np.float32)
        top = 65535.0 if image.mode.startswith("I;16") or deep.max() > 255 else 255.0
        grey = np.clip(np.rint(deep * (255.0 / top)), 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        deep = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
        spread = float(deep.max() - deep.min()) or 1.0
        grey = np.rint((deep - deep.min()) * (255.0 / spread)).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layer).convert("RGB")
    if profile is not None and image.mode in ("RGB", "CMYK", "L"):
        try:
            image = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except ImageCms.PyCMSError:  # the profile does not fit the mode: plain conversion is the best that is left
            pass
    return np.array(image.convert("RGB"))


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as PNG. Large images take the fast level: size matters less than the night's hours."""
    buffer = io.BytesIO()
    level = 6 if pixels.size <= 256 * 256 * 3 else 1
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


def decode_stored(payload: bytes) -> np.ndarray:
    """Pixels, uint8 [H, W, 3], of bytes from the `images` table: those are known to be clean RGB, so no checks."""
    if payload[:2] == b"\xff\xd8":
        return simplejpeg.decode_jpeg(payload, "RGB")
    with Image.open(io.BytesIO(payload)) as image:
        return np.array(image.convert("RGB") if image.mode != "RGB" else image)
