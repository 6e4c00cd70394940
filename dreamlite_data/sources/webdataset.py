"""Read WebDataset shards: tar files whose members `key.suffix` with one key form one sample.
Members are read in memory and never extracted; a shard that cannot be read to its end is refused whole."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from dreamlite_data.settings import IngestSettings
from dreamlite_data.sources import mapping as mappings
from dreamlite_data.sources.base import (
    CAPTION_SUFFIXES,
    METADATA_SUFFIX,
    DigestCache,
    Record,
    ShardError,
    Unit,
    finish,
    over_limit,
    read_sidecar,
)
from dreamlite_data.sources.mapped import ImageStore, records
from dreamlite_data.sources.mapped_source import PEEKED_ROWS, unit_digest
from dreamlite_data.sources.walk import files_below

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "tif", "tiff", "bmp", "avif", "ppm")
ROLES = ("source", "target")
ZERO_READ_BYTES = 64 * 1024


@dataclasses.dataclass(frozen=True)
class ShardReading:
    """How a shard with a mapping is read."""

    mapping: mappings.Mapping


@dataclasses.dataclass(frozen=True)
class WebDatasetSource:
    """Every `*.tar` below `path`, in name order."""

    name: str
    path: Path
    domain: str = "other"
    licence: str | None = None
    origin: str | None = None
    mapping: mappings.Mapping | None = None

    def units(self, digests: DigestCache) -> Iterator[Unit]:
        """One unit per shard. Raises MappingError where the first sample of the first readable shard lacks a mapped column."""
        reading = ShardReading(self.mapping) if self.mapping else None
        checked = False
        for file in files_below(self.path, hidden=True):
            if file.suffix != ".tar":
                continue
            content = digests.digest(file)
            if self.mapping and not checked and (first := _first_sample(file)):
                mappings.check_rows(self.mapping, [first], f"{self.name}/{file.name}")
                checked = True
            yield Unit(
                source=self.name, domain=self.domain, shard=file.relative_to(self.path).as_posix(), path=str(file),
                digest=unit_digest(content, reading) if reading else content, kind="tar", size_bytes=file.stat().st_size,
                licence=self.licence or (self.mapping.licence if self.mapping else None),
                origin=self.origin or (self.mapping.origin if self.mapping else None), reading=reading,
            )  # fmt: skip


def _first_sample(file: Path) -> dict[str, Any]:
    """The columns of the first sample of a shard; none where it cannot be read, which its unit will say."""
    row: dict[str, Any] = {}
    key = None
    try:
        for member in members(str(file), IngestSettings()):
            if isinstance(member, Record):
                continue
            if key not in (None, member.key):
                break
            key = member.key
            row |= _columns(member)
    except ShardError:
        pass
    return row


def read_shard(unit: Unit, limits: IngestSettings) -> list[Record]:
    """All records of one shard, in member order. Raises ShardError where the tar is damaged anywhere."""
    found: dict[str, Record] = {}
    refused: list[Record] = []
    for member in members(unit.path, limits):
        if isinstance(member, Record):
            refused.append(member)
        else:
            _add_member(found.setdefault(member.key, Record(key=member.key)), member.suffix, member.payload)
    return [finish(record) for record in found.values()] + refused


def read_mapped_shard(unit: Unit, limits: IngestSettings) -> list[Record]:
    """All records of one shard whose columns a mapping names: an image is the column of its suffix without the format ('1.0' of
    key.1.0.jpg), a .txt is 'txt', and the fields of a .json are columns themselves."""
    rows: dict[str, dict[str, Any]] = {}
    found: list[Record] = []
    for member in members(unit.path, limits):
        if isinstance(member, Record):
            found.append(member)
            continue
        row, columns = rows.setdefault(member.key, {}), _columns(member)
        if member.suffix.rpartition(".")[2] in IMAGE_SUFFIXES and row.keys() & columns.keys():
            detail = f"two members of key {member.key!r} hold {next(iter(columns))!r}: the first was taken"
            found.append(Record(f"{member.key}#repeated{len(found)}", error="repeated_key", detail=detail))
        else:
            row.update(columns)
    try:
        if rows:
            mappings.check_rows(unit.reading.mapping, list(rows.values())[:PEEKED_ROWS], unit.shard)
    except mappings.MappingError as error:
        raise ShardError(str(error)) from None
    images = ImageStore(None, limits)
    return [record for key, row in rows.items() for record in records(unit.reading.mapping, key, row, images)] + found


@dataclasses.dataclass(frozen=True)
class Member:
    """A file of a sample: `key.suffix`, the suffix in lower case."""

    key: str
    suffix: str
    payload: bytes


def members(path: str, limits: IngestSettings) -> Iterator[Member | Record]:
    """Every file in a tar; one that may not be read comes as the record of a failure. Several tars written one after the other into
    a file (X2Edit ships such shards) are read to the last, and a key of the n-th further one ends in '~n'."""
    try:
        with open(path, "rb") as handle:
            start: int | None = 0
            for part in itertools.count():
                handle.seek(start)
                with tarfile.open(fileobj=handle, mode="r:") as tar:
                    for info in tar:
                        if not info.isdir():
                            yield _member(tar, info, limits, f"~{part}" if part else "")
                    start = _next_archive(handle, tar.offset)
                if start is None:
                    return
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ShardError(f"not a readable tar: {error}") from None


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo, limits: IngestSettings, mark: str) -> Member | Record:
    problem = _refuse(info, limits)
    if problem:
        return Record(key=_printable(info.name) + mark, error=problem[0], detail=problem[1])
    folder, _, name = info.name.rpartition("/")
    stem, _, suffix = name.partition(".")
    handle = tar.extractfile(info)
    payload = handle.read() if handle else b""
    if len(payload) != info.size:
        raise ShardError(f"the shard ends inside member {_printable(info.name)}")
    return Member(_printable(f"{folder}/{stem}" if folder else stem) + mark, suffix.lower(), payload)


def _columns(member: Member) -> dict[str, Any]:
    role, _, last = member.suffix.rpartition(".")
    if last in IMAGE_SUFFIXES:
        return {role or "image": member.payload}
    if member.suffix == METADATA_SUFFIX:
        try:
            fields = json.loads(member.payload)
        except (ValueError, RecursionError):
            return {}  # the columns it should have brought will be missing from the record, which says so
        return fields if isinstance(fields, dict) else {}
    return {member.suffix: member.payload.decode("utf-8", "backslashreplace")}


def _refuse(member: tarfile.TarInfo, limits: IngestSettings) -> tuple[str, str] | None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\x00" in member.name:
        return "unsafe_name", f"the member name {_printable(member.name)!r} points outside its folder"
    if not member.isfile():
        return "not_a_file", "a link or device inside the tar"
    problem = over_limit(member.size, limits)
    return ("too_large", problem) if problem else None


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _add_member(record: Record, suffix: str, payload: bytes) -> None:
    role, _, last = suffix.rpartition(".")
    if suffix in CAPTION_SUFFIXES or suffix == METADATA_SUFFIX:
        read_sidecar(record, suffix, payload)
    elif last in IMAGE_SUFFIXES and role in ("", *ROLES):
        if role in record.images:
            record.error, record.detail = "repeated_key", f"two members of key {record.key!r} hold the image {role or 'of the sample'}"
        record.images[role] = payload
    else:
        record.notes.append(f"ignored .{_printable(suffix)}")


def _next_archive(handle: BinaryIO, offset: int) -> int | None:
    """Where another tar starts after the one that was read up to `offset`; None where only zeros follow. tarfile stops without a
    word at a damaged header: only a zero block there is a real end of archive, anything else raises ShardError."""
    zero = bytes(tarfile.BLOCKSIZE)
    handle.seek(offset)
    block = handle.read(tarfile.BLOCKSIZE)
    if block != zero:
        # the reader may already have stepped over the zero block
        handle.seek(max(0, offset - tarfile.BLOCKSIZE))
        if block or handle.read(tarfile.BLOCKSIZE) != zero:
            raise ShardError(f"the shard is damaged or cut at byte {offset}")
    position = handle.tell()
    while block := handle.read(ZERO_READ_BYTES):
        if block.strip(b"\0"):
            used = len(block) - len(block.lstrip(b"\0"))
            return position + used // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        position += len(block)
    return None
