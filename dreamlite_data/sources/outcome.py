"""What is asked of a URL, what became of it, and where its bytes lie.
Apart from the downloader, so that who only looks outcomes up loads no HTTP library."""

from __future__ import annotations

import dataclasses
from pathlib import Path

WRONG_SHA256, LISTED = "wrong_sha256", "the list says"
"""The error of bytes that are not those of the list, and how `detail` quotes what that says: once it says another, they are asked for
again."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One URL to fetch. `sha256` is what its bytes must have, where the list says so; `tries` how often it was asked before."""

    url: str
    sha256: str | None = None
    tries: int = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a URL: the sha256 of the stored bytes, or `error` (a reason to group by) and `detail`. A `permanent` failure
    would be the same tomorrow."""

    url: str
    tries: int
    status: int | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    etag: str | None = None
    mime: str | None = None
    permanent: bool = False
    error: str | None = None
    detail: str | None = None


def place(folder: Path, sha256: str) -> Path:
    """Where the bytes with this digest lie."""
    return folder / sha256[:2] / sha256
