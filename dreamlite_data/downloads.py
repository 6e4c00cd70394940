"""Fetch what sources name by URL and keep the outcome of each URL in the lake: the bytes below files/downloads, a row in op_download.
Pending is what no row speaks for: a URL is fetched once, passing failures a limited number of times, failures for good never again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from dreamlite_data import schema
from dreamlite_data.lake import Lake, insert
from dreamlite_data.operators.base import op_version
from dreamlite_data.operators.run import make_current
from dreamlite_data.progress import Progress
from dreamlite_data.settings import DownloadSettings
from dreamlite_data.sources.outcome import LISTED, WRONG_SHA256, Job, Outcome, place
from dreamlite_data.tombstones import FORGOTTEN

COMMIT_S = 5.0
"""Outcomes are committed at least this often while they come: what a kill can cost is the asking, for stored bytes are not lost."""
PORTION_URLS = 65_536
"""URLs that are compared with the lake and fetched at a time: enough hosts among them to keep every connection busy."""
OUTCOME_FIELDS = ("max_file_mb", "timeout_s", "max_redirects", "opt_out", "private_networks", "user_agent")
"""Settings that can turn a failure into a success; how fast and how often URLs are asked cannot."""


class UrlSource(Protocol):
    """A source that names files by URL."""

    name: str

    def urls(self) -> Iterator[tuple[str, str | None]]: ...


def folder(lake: Lake) -> Path:
    """Where downloaded bytes lie, each file under its sha256."""
    return lake.files / "downloads"


@dataclasses.dataclass(frozen=True)
class Download:
    """What names the rows that these settings write, as of any operator."""

    settings: DownloadSettings
    name = "download"
    version = 1

    def config(self) -> dict[str, Any]:
        return self.settings.model_dump(mode="json", include=set(OUTCOME_FIELDS))


def fetch(lake: Lake, sources: Iterable[Any], settings: DownloadSettings) -> dict[str, int]:
    """Fetch the pending URLs of those sources that have any. Returns how many were named, asked, and how many of these failed."""
    with contextlib.closing(sqlite3.connect("")) as wanted:  # a temporary file: a list may have more URLs than memory
        wanted.execute("CREATE TABLE wanted (position INTEGER PRIMARY KEY, url TEXT UNIQUE, sha256 TEXT)")
        wanted.executemany(
            "INSERT INTO wanted (url, sha256) VALUES (?, ?) ON CONFLICT (url) DO UPDATE SET sha256 = coalesce(nullif(sha256, ''), excluded.sha256)",
            (pair for source in sources if hasattr(source, "urls") for pair in source.urls()),
        )
        (count,) = wanted.execute("SELECT count(*) FROM wanted").fetchone()
        if not count:
            return {}
        version = op_version(Download(settings))
        answer = {"urls": count, "asked": 0, "download_failed": 0}
        listed = wanted.execute("SELECT url, sha256 FROM wanted ORDER BY position")
        with Progress("download", total=count, unit="urls") as bar:
            while portion := dict(listed.fetchmany(PORTION_URLS)):
                jobs = pending(lake, portion, settings)
                answer["asked"] += len(jobs)
                bar.advance(len(portion) - len(jobs))
                answer["download_failed"] += _download(lake, jobs, settings, version, bar)
    make_current(lake, Download.name, version, Download(settings).config())
    return answer


def _download(lake: Lake, jobs: list[Job], settings: DownloadSettings, version: str, bar: Progress) -> int:
    """Fetch and commit; how many failed."""
    failed = 0
    if jobs:
        from dreamlite_data.sources.download import download  # loading the HTTP library takes longer than a look that finds nothing

        for outcomes in _in_groups(download(jobs, settings, folder(lake)), COMMIT_S):
            _commit(lake, outcomes, version)
            failed += sum(outcome.error is not None for outcome in outcomes)
            bar.advance(len(outcomes), failed=failed)
    return failed


def pending(lake: Lake, wanted: Mapping[str, str | None], settings: DownloadSettings) -> list[Job]:
    """The URLs that have to be asked, in the order in which they were named."""
    version = op_version(Download(settings))
    known = _rows(lake, list(wanted))
    jobs = []
    for url, sha256 in wanted.items():
        row = known.get(url)
        if row is not None and row["error"] == FORGOTTEN:
            continue  # whatever the settings say now: its bytes are not fetched again
        if row is None or (row["error"] == WRONG_SHA256 and (sha256 is None or f"{LISTED} {sha256}" not in row["detail"])):
            jobs.append(Job(url, sha256))
        elif row["error"] is None:
            if (sha256 is not None and row["sha256"] != sha256.lower()) or not place(folder(lake), row["sha256"]).is_file():
                jobs.append(Job(url, sha256))
        elif row["op_version"] != version:
            jobs.append(Job(url, sha256))
        elif settings.retry_permanent if row["permanent"] else row["tries"] < settings.max_tries:
            jobs.append(Job(url, sha256, row["tries"]))
    return jobs


def outcomes(lake: Lake) -> Callable[[list[str]], dict[str, str]]:
    """A function from URLs to what became of them: the path of the file, or 'error:<reason>:<detail>'. It knows what the lake knows
    when it is called."""
    return functools.partial(_outcomes, lake)


def _outcomes(lake: Lake, urls: list[str]) -> dict[str, str]:
    return {
        url: str(place(folder(lake), row["sha256"])) if row["error"] is None else f"error:{row['error']}:{row['detail']}"
        for url, row in _rows(lake, urls).items()
    }


def _rows(lake: Lake, urls: list[str]) -> dict[str, dict[str, Any]]:
    if not urls:
        return {}
    found = lake.query(
        "SELECT d.* FROM op_download d SEMI JOIN wanted w ON w.url = d.subject_id", wanted=pa.table({"url": pa.array(urls, pa.string())})
    )
    return {row["subject_id"]: row for row in found.to_pylist()}


def _in_groups(found: Iterator[Outcome], every_s: float) -> Iterator[list[Outcome]]:
    group: list[Outcome] = []
    begun = time.monotonic()
    for outcome in found:
        group.append(outcome)
        if time.monotonic() - begun >= every_s:
            yield group
            group, begun = [], time.monotonic()
    if group:
        yield group


def _commit(lake: Lake, found: list[Outcome], version: str) -> None:
    """One row per URL: the newest outcome takes the place of an earlier one."""
    rows = [
        {
            "subject_id": outcome.url, "op_version": version, "status": outcome.status, "sha256": outcome.sha256,
            "size_bytes": outcome.size_bytes, "etag": outcome.etag, "mime": outcome.mime, "tries": outcome.tries,
            "permanent": outcome.permanent, "error": outcome.error, "detail": outcome.detail,
        }
        for outcome in sorted(found, key=lambda outcome: outcome.url)
    ]  # fmt: skip
    table = schema.rows_table("op_download", rows)

    def body(connection: Any) -> None:
        connection.register("asked", table.select(["subject_id"]))
        connection.execute("DELETE FROM op_download WHERE subject_id IN (SELECT subject_id FROM asked)")
        connection.unregister("asked")
        insert(connection, {"op_download": table})

    lake.write(body)
