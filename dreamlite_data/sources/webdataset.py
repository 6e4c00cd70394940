"""Read WebDataset shards: tar files whose members `key.suffix` with one key form one sample.
Members are read in memory and never extracted; a shard that cannot be read to its end is refused whole."""

from __future__ import annotations

import dataclasses
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dreamlite_data.settings import IngestSettings
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

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "tif", "tiff", "bmp", "avif", "ppm")
ROLES = ("source", "target")


@dataclasses.dataclass(frozen=True)
class WebDatasetSource:
    """Every `*.tar` below `path`, in name order."""

    name: str
    path: Path
    domain: str = "other"
    licence: str | None = None

    def units(self, digests: DigestCache) -> Iterator[Unit]:
        """One unit per shard."""
        for file in sorted(self.path.rglob("*.tar")):
            yield Unit(
                source=self.name, domain=self.domain, shard=file.relative_to(self.path).as_posix(), path=str(file),
                digest=digests.digest(file), kind="tar", size_bytes=file.stat().st_size, licence=self.licence,
            )  # fmt: skip


def read_shard(unit: Unit, limits: IngestSettings) -> list[Record]:
    """All records of one shard, in member order. Raises ShardError where the tar is damaged anywhere."""
    records: dict[str, Record] = {}
    refused: list[Record] = []
    try:
        with tarfile.open(unit.path, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                problem = _refuse(member, limits)
                if problem:
                    refused.append(Record(key=_printable(member.name), error=problem[0], detail=problem[1]))
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                handle = tar.extractfile(member)
                payload = handle.read() if handle else b""
                if len(payload) != member.size:
                    raise ShardError(f"the shard ends inside member {_printable(member.name)}")
                key = _printable(f"{folder}/{stem}" if folder else stem)
                _add_member(records.setdefault(key, Record(key=key)), suffix.lower(), payload)
            _check_end(unit.path, tar.offset)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ShardError(f"not a readable tar: {error}") from None
    return [finish(record) for record in records.values()] + refused


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


def _check_end(path: str, offset: int) -> None:
    """tarfile stops without a word at a damaged header: only a zero block there is a real end of archive."""
    with open(path, "rb") as handle:
        handle.seek(offset)
        block = handle.read(tarfile.BLOCKSIZE)
        if block != bytes(tarfile.BLOCKSIZE):
            # the reader may already have stepped over the zero block
            handle.seek(max(0, offset - tarfile.BLOCKSIZE))
            if block or handle.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ShardError(f"the shard is damaged or cut at byte {offset}")
