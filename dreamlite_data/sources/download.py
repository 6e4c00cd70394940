"""Fetch files over HTTP within limits, politely, and never from an address that is not of the public internet unless that is allowed.
A file is stored once under the sha256 of its bytes; whatever happens to a URL comes back as an outcome, never as an exception."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import ipaddress
import os
import queue
import re
import socket
import threading
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from dreamlite_data.settings import DownloadSettings
from dreamlite_data.sources.outcome import LISTED, WRONG_SHA256, Job, Outcome, place

BATCH_URLS = 4096
"""URLs that wait for their turn at once; each is one coroutine."""
CHUNK_BYTES = 64 * 1024
MAX_RETRY_AFTER_S = 60.0
REDIRECTS = (301, 302, 303, 307, 308)
PASSING_STATUS = (408, 425, 429)
"""4xx answers that say "later": time-out, too early, too many requests. Every 5xx does too."""
VALUED_DIRECTIVES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
"""X-Robots-Tag directives that hold a colon themselves; before any other colon stands the name of a robot.
https://developers.google.com/search/docs/crawling-indexing/robots-meta-tag"""


class _Refused(Exception):
    def __init__(self, reason: str, detail: str, permanent: bool, status: int | None = None) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.permanent, self.status = reason, detail, permanent, status


def download(jobs: Iterable[Job], settings: DownloadSettings, folder: Path, resolver: AbstractResolver | None = None) -> Iterator[Outcome]:
    """Fetch every job into `folder` and yield each outcome as it comes, in no fixed order. Passing failures are asked again after
    `retry_pause_s`, up to `tries_per_run` here and `max_tries` in all; only the last outcome of a URL is yielded."""
    folder.mkdir(parents=True, exist_ok=True)
    for lost in folder.glob(".part-*"):
        lost.unlink(missing_ok=True)  # what a killed run left
    waiting = list(jobs)
    for start in range(0, len(waiting), BATCH_URLS):
        again = waiting[start : start + BATCH_URLS]
        for turn in range(1, settings.tries_per_run + 1):
            retry: list[Job] = []
            for job, outcome in _fetch_all(again, settings, folder, resolver):
                passing = outcome.error is not None and not outcome.permanent
                if passing and turn < settings.tries_per_run and outcome.tries < settings.max_tries:
                    retry.append(dataclasses.replace(job, tries=outcome.tries))
                else:
                    yield outcome
            again = retry
            if not again:
                break
            threading.Event().wait(settings.retry_pause_s)


def _fetch_all(
    jobs: list[Job], settings: DownloadSettings, folder: Path, resolver: AbstractResolver | None
) -> Iterator[tuple[Job, Outcome]]:
    """Runs the event loop in a thread, so that whoever takes the outcomes may commit them meanwhile."""
    answers: queue.Queue[tuple[Job, Outcome] | BaseException | None] = queue.Queue()
    stop = threading.Event()

    def run() -> None:
        try:
            asyncio.run(_Fetcher(settings, folder, resolver).fetch_all(jobs, answers, stop))
            answers.put(None)
        except BaseException as error:  # handed to the reader, or it would wait for ever
            answers.put(error)

    thread = threading.Thread(target=run, name="download", daemon=True)
    thread.start()
    try:
        while (answer := answers.get()) is not None:
            if isinstance(answer, BaseException):
                raise answer
            yield answer
    finally:
        stop.set()
        thread.join(timeout=settings.timeout_s + 5)


class _Fetcher:
    def __init__(self, settings: DownloadSettings, folder: Path, resolver: AbstractResolver | None) -> None:
        self.settings, self.folder = settings, folder
        self.allowed = tuple(ipaddress.ip_network(text) for text in settings.private_networks)
        self._resolver = resolver
        self._hosts: dict[str, _Host] = {}

    async def fetch_all(self, jobs: list[Job], answers: queue.Queue, stop: threading.Event) -> None:
        connector = aiohttp.TCPConnector(
            limit=self.settings.connections,
            limit_per_host=0,  # politeness is counted per host name below, waiting time included
            resolver=CheckedResolver(self._resolver or aiohttp.ThreadedResolver(), self.allowed),
            use_dns_cache=False,  # an address counts for the connection it was checked for, and no longer
        )
        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),  # one deadline for a file stands around all its requests
            headers={"User-Agent": self.settings.user_agent, "Accept": "image/*,*/*;q=0.1", "Accept-Encoding": "identity"},
            auto_decompress=False,
            trust_env=False,  # a proxy would connect for us, unchecked
        ) as session:
            room = asyncio.Semaphore(self.settings.connections)

            async def one(job: Job) -> None:
                if not stop.is_set():
                    answers.put((job, await self._fetch(session, room, job)))

            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    group.create_task(one(job))

    async def _fetch(self, session: aiohttp.ClientSession, room: asyncio.Semaphore, job: Job) -> Outcome:
        try:
            return await self._follow(session, room, job)
        except _Refused as refused:
            status, reason, detail, permanent = refused.status, refused.reason, refused.detail, refused.permanent
        except TimeoutError:
            status, reason, detail, permanent = None, "timeout", f"not done within {self.settings.timeout_s:g} s", False
        except (aiohttp.InvalidURL, aiohttp.InvalidUrlClientError, ValueError) as error:
            status, reason, detail, permanent = None, "bad_url", str(error), True
        except (aiohttp.ClientError, OSError) as error:
            status, reason, detail, permanent = None, "connection_failed", f"{type(error).__name__}: {error}", False
        except Exception as error:  # a library's own bug must cost one URL, not the night
            status, reason, detail, permanent = None, "download_failed", f"{type(error).__name__}: {error}", False
        return Outcome(job.url, job.tries + 1, status, permanent=permanent, error=reason, detail=detail[:500])

    async def _follow(self, session: aiohttp.ClientSession, room: asyncio.Semaphore, job: Job) -> Outcome:
        url = URL(job.url)
        spent_s = 0.0
        loop = asyncio.get_running_loop()
        for _ in range(self.settings.max_redirects + 1):
            self._check_url(url)
            async with self._turn(url.host or ""), room:
                begun = loop.time()
                async with asyncio.timeout(self.settings.timeout_s - spent_s):
                    async with session.get(url, allow_redirects=False) as response:
                        self._check_response(response)
                        if response.status not in REDIRECTS:
                            return await self._store(job, response)
                        location = response.headers.get("Location")
                        if not location:
                            raise _Refused("bad_redirect", "a redirect without an address", True, response.status)
                        url = url.join(URL(location))
                spent_s += loop.time() - begun
        raise _Refused("too_many_redirects", f"more than {self.settings.max_redirects} redirects", True)

    def _check_url(self, url: URL) -> None:
        if url.scheme not in ("http", "https"):
            raise _Refused("bad_url", f"only http and https are fetched, not {url.scheme or 'an address without a scheme'}", True)
        if not url.host:
            raise _Refused("bad_url", "the address has no host", True)
        if url.user or url.password:
            raise _Refused("bad_url", "the address holds a user name or password", True)
        with contextlib.suppress(ValueError):  # a name, no address: the resolver checks what it leads to
            if not is_public(ipaddress.ip_address(url.host), self.allowed):
                raise _Refused("private_address", f"{url.host} is not an address of the public internet", True)

    def _check_response(self, response: aiohttp.ClientResponse) -> None:
        refused = opted_out(response.headers.getall("X-Robots-Tag", []), self.settings)
        if refused:
            raise _Refused("opt_out", f"the server sends X-Robots-Tag: {refused}", True, response.status)
        if response.status in REDIRECTS or response.status == 200:
            return
        passing = response.status >= 500 or response.status in PASSING_STATUS
        if passing:
            self._host(response.url.host or "").pause(_retry_after_s(response))
        raise _Refused(f"http_{response.status}", f"the server answers {response.status} {response.reason or ''}".strip(), not passing, response.status)

    async def _store(self, job: Job, response: aiohttp.ClientResponse) -> Outcome:
        limit = self.settings.max_file_mb * 2**20
        if response.content_length is not None and response.content_length > limit:
            raise self._too_large(response)
        draft = self.folder / f".part-{uuid.uuid4().hex}"
        digest, size = hashlib.sha256(), 0
        try:
            with draft.open("wb") as handle:
                async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                    size += len(chunk)
                    if size > limit:
                        raise self._too_large(response)
                    digest.update(chunk)
                    handle.write(chunk)
                handle.flush()
                os.fsync(handle.fileno())
            found = digest.hexdigest()
            if job.sha256 is not None and found != job.sha256.lower():
                raise _Refused(WRONG_SHA256, f"the bytes have sha256 {found}, {LISTED} {job.sha256}", True, response.status)
            target = place(self.folder, found)
            target.parent.mkdir(exist_ok=True)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
        return Outcome(
            job.url, job.tries + 1, response.status, found, size, response.headers.get("ETag"), response.content_type or None
        )  # fmt: skip

    def _too_large(self, response: aiohttp.ClientResponse) -> _Refused:
        return _Refused("too_large", f"more than {self.settings.max_file_mb} MB", True, response.status)

    def _host(self, name: str) -> _Host:
        return self._hosts.setdefault(name.lower(), _Host(self.settings))

    @contextlib.asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[None]:
        host = self._host(name)
        async with host.room:
            await host.wait()
            yield


class _Host:
    """What one host is asked at once and how often."""

    def __init__(self, settings: DownloadSettings) -> None:
        self.room = asyncio.Semaphore(settings.connections_per_host)
        self._interval_s = settings.host_interval_s
        self._next = 0.0

    async def wait(self) -> None:
        now = asyncio.get_running_loop().time()
        start = max(now, self._next)
        self._next = start + self._interval_s
        if start > now:
            await asyncio.sleep(start - now)

    def pause(self, seconds: float) -> None:
        self._next = max(self._next, asyncio.get_running_loop().time() + seconds)


class CheckedResolver(AbstractResolver):
    """Resolves names and lets only public addresses through. The connection is then made to exactly these, so a name that
    resolves to something else a moment later gains nothing."""

    def __init__(self, inner: AbstractResolver, allowed: tuple[Any, ...]) -> None:
        self._inner, self._allowed = inner, allowed

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        """Addresses of `host`; raises where every one of them is private."""
        found = await self._inner.resolve(host, port, family)
        public = [item for item in found if is_public(ipaddress.ip_address(item["host"].partition("%")[0]), self._allowed)]
        if found and not public:
            raise _Refused("private_address", f"{host} leads to {found[0]['host']}, which is not an address of the public internet", True)
        return public

    async def close(self) -> None:
        await self._inner.close()


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address, allowed: tuple[Any, ...] = ()) -> bool:
    """Whether an address is of the public internet, or in an `allowed` network. An IPv4 address inside an IPv6 one (mapped, 6to4,
    NAT64) is looked at itself."""
    if any(address in network for network in allowed if network.version == address.version):
        return True
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner, allowed)
    return address.is_global and not address.is_multicast


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def opted_out(headers: list[str], settings: DownloadSettings) -> str | None:
    """The directive of the X-Robots-Tag headers by which this robot may not keep the file; None where it may."""
    wanted = {directive.lower() for directive in settings.opt_out}
    if "noindex" in wanted:
        wanted.add("none")  # short for noindex, nofollow
    us = re.split(r"[/ ]", settings.user_agent.lower(), maxsplit=1)[0]
    for header in headers:
        robot = "*"
        for part in header.lower().split(","):
            name, colon, rest = part.partition(":")
            if colon and name.strip() not in VALUED_DIRECTIVES:
                robot, part = name.strip(), rest
            if robot in ("*", us) and part.strip() in wanted:
                return part.strip()
    return None


def _retry_after_s(response: aiohttp.ClientResponse) -> float:
    text = response.headers.get("Retry-After", "")
    return min(MAX_RETRY_AFTER_S, float(text)) if text.isdigit() else 0.0
