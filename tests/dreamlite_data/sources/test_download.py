"""The downloader stays within its limits whatever a server does, asks politely, and reaches no address that is not of the internet."""

from __future__ import annotations

import hashlib
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp.abc import AbstractResolver

from dreamlite_data.settings import DownloadSettings
from dreamlite_data.sources.download import download, is_public, opted_out
from dreamlite_data.sources.outcome import Job, Outcome, place
from tests.dreamlite_data.sources.tables import picture
from tests.dreamlite_data.sources.web import Web, serving


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with serving() as server:
        yield server


def _settings(**changes: object) -> DownloadSettings:
    """This machine counts as the internet, and nobody waits."""
    base = {"private_networks": ["127.0.0.1/32"], "host_interval_s": 0, "retry_pause_s": 0, "max_file_mb": 1, "timeout_s": 5, "tries_per_run": 1}
    return DownloadSettings(**{**base, **changes})


def _fetch(web: Web, folder: Path, *paths: str, **changes: object) -> dict[str, Outcome]:
    jobs = [Job(path if path.startswith(("http", "ftp", "file", "no ")) else web.url(path)) for path in paths]
    found = list(download(jobs, _settings(**changes), folder))
    assert len(found) == len(jobs)
    by_url = {outcome.url: outcome for outcome in found}
    return {path: by_url[job.url] for path, job in zip(paths, jobs, strict=True)}


def _files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob("*") if file.is_file())


def test_a_file_is_stored_once_under_its_digest_with_what_the_server_said(web: Web, tmp_path: Path) -> None:
    found = _fetch(web, tmp_path, "ok/1", f"to/{web.url('ok/1')}")
    digest = hashlib.sha256(picture(1)).hexdigest()
    for outcome in found.values():
        assert (outcome.error, outcome.sha256, outcome.size_bytes, outcome.status) == (None, digest, len(picture(1)), 200)
    assert (found["ok/1"].etag, found["ok/1"].mime) == ('"1"', "image/png")
    assert _files(tmp_path) == [digest] and place(tmp_path, digest).read_bytes() == picture(1)


@pytest.mark.parametrize(
    ("path", "error", "permanent"),
    [
        ("slow/a", "timeout", False), ("endless/a", "too_large", True), ("large/a", "too_large", True), ("loop/0", "too_many_redirects", True),
        ("404/a", "http_404", True), ("410/a", "http_410", True), ("429/a", "http_429", False), ("500/a", "http_500", False),
        ("204/a", "http_204", True), ("to/ftp://x.example/a", "bad_url", True), ("to/http://user:word@127.0.0.1/", "bad_url", True),
        ("ftp://x.example/a", "bad_url", True), ("file:///etc/hostname", "bad_url", True), ("no url", "bad_url", True),
        ("http://127.0.0.1:1/closed", "connection_failed", False),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_an_outcome_and_leaves_no_file(web: Web, tmp_path: Path, path: str, error: str, permanent: bool) -> None:
    outcome = _fetch(web, tmp_path, path, timeout_s=1)[path]
    assert (outcome.error, outcome.permanent, outcome.sha256) == (error, permanent, None), outcome.detail
    assert _files(tmp_path) == [] and outcome.detail


PRIVATE = (
    "http://127.0.0.2:{port}/ok/1", "http://[::1]:{port}/ok/1", "http://[::ffff:10.0.0.1]/", "http://10.1.2.3/",
    "http://169.254.169.254/latest/meta-data", "http://0.0.0.0:{port}/ok/1", "http://2130706433:{port}/ok/1", "http://127.1:{port}/ok/1",
)  # fmt: skip


@pytest.mark.parametrize(
    ("address", "redirected"), [("http://localhost:{port}/ok/1", False), *((address, way) for address in PRIVATE for way in (False, True))]
)
def test_private_addresses_are_not_reached_not_even_by_redirect(web: Web, tmp_path: Path, address: str, redirected: bool) -> None:
    address = address.replace("{port}", str(web.server_port))
    before = web.asked["ok/1"]
    path = f"to/{address}" if redirected else address
    networks = ["127.0.0.1/32"] if redirected else []
    outcome = _fetch(web, tmp_path, path, private_networks=networks)[path]
    assert outcome.error in ("private_address", "bad_url") and outcome.permanent, outcome.detail
    assert web.asked["ok/1"] == before and _files(tmp_path) == []


class _Names(AbstractResolver):
    """Answers each look-up with the next address of a list."""

    def __init__(self, *addresses: str) -> None:
        self.addresses, self.asked = list(addresses), 0

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list:
        address = self.addresses[min(self.asked, len(self.addresses) - 1)]
        self.asked += 1
        return [{"hostname": host, "host": address, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}]

    async def close(self) -> None:
        pass


def test_the_connection_is_made_to_the_address_that_was_checked(web: Web, tmp_path: Path) -> None:
    url = f"http://rebinding.example:{web.server_port}/ok/1"
    names = _Names("127.0.0.1", "127.0.0.2")  # the second answer would be a rebinding
    outcome = next(download([Job(url)], _settings(), tmp_path, names))
    assert outcome.error is None and names.asked == 1
    outcome = next(download([Job(url)], _settings(), tmp_path, _Names("127.0.0.2")))
    assert outcome.error == "private_address" and "127.0.0.2" in outcome.detail
    outcome = next(download([Job(url)], _settings(private_networks=[]), tmp_path, _Names("127.0.0.1")))
    assert outcome.error == "private_address"


@pytest.mark.parametrize(
    ("address", "public"),
    [("8.8.8.8", True), ("2606:4700::1111", True), ("10.0.0.1", False), ("172.16.0.1", False), ("192.168.1.1", False), ("127.0.0.1", False),
     ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False), ("240.0.0.1", False), ("::1", False),
     ("fe80::1", False), ("fd00::1", False), ("::ffff:192.168.0.1", False), ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False)],
)  # fmt: skip
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


@pytest.mark.parametrize(
    ("headers", "directive"),
    [
        ([], None), (["all"], None), (["noai"], "noai"), (["nofollow, NoImageAI"], "noimageai"), (["none"], "none"), (["nofollow", "noindex"], "noindex"),
        (["googlebot: noindex"], None), (["googlebot: noindex, noai"], None), (["dreamlite-pipeline: noai"], "noai"),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], "noai"), (["max-snippet:50, noimageindex"], "noimageindex"),
    ],
)  # fmt: skip
def test_which_opt_out_headers_count(headers: list[str], directive: str | None) -> None:
    assert opted_out(headers, DownloadSettings()) == directive


def test_an_opt_out_is_honoured_and_the_setting_names_what_counts(web: Web, tmp_path: Path) -> None:
    found = _fetch(web, tmp_path, "robots/noai", "robots/googlebot:+noai", "robots/noarchive")
    assert [outcome.error for outcome in found.values()] == ["opt_out", None, None] and found["robots/noai"].permanent
    found = _fetch(web, tmp_path, "robots/noai", "robots/noarchive", opt_out=["noarchive"])
    assert [outcome.error for outcome in found.values()] == [None, "opt_out"]


def test_wrong_bytes_are_refused(web: Web, tmp_path: Path) -> None:
    right = hashlib.sha256(picture(1)).hexdigest()
    found = list(download([Job(web.url("ok/1"), right.upper()), Job(web.url("ok/2"), right)], _settings(), tmp_path))
    assert {outcome.url[-1]: outcome.error for outcome in found} == {"1": None, "2": "wrong_sha256"} and _files(tmp_path) == [right]


def test_passing_failures_are_asked_again_and_permanent_ones_are_not(web: Web, tmp_path: Path) -> None:
    web.asked.clear()
    found = _fetch(web, tmp_path, "flaky/a", "500/b", "404/b", tries_per_run=3)
    assert {path: (outcome.error, outcome.tries) for path, outcome in found.items()} == {
        "flaky/a": (None, 2), "500/b": ("http_500", 3), "404/b": ("http_404", 1)
    }  # fmt: skip
    assert (web.asked["flaky/a"], web.asked["500/b"], web.asked["404/b"]) == (2, 3, 1)


def test_one_host_is_asked_by_few_at_once_and_not_too_fast(web: Web, tmp_path: Path) -> None:
    web.most_at_once = 0
    _fetch(web, tmp_path, *(f"ok/{number}" for number in range(12)), connections_per_host=2)
    assert web.most_at_once == 2
    web.times.clear()
    _fetch(web, tmp_path, *(f"ok/{number}" for number in range(6)), connections_per_host=6, host_interval_s=0.1)
    assert web.times[-1] - web.times[0] >= 0.45  # five pauses between six requests, the clock's grain apart


def test_a_draft_that_a_killed_run_left_is_removed(web: Web, tmp_path: Path) -> None:
    (tmp_path / ".part-1").write_bytes(b"half")
    _fetch(web, tmp_path, "404/a")
    assert _files(tmp_path) == []
