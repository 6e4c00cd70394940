"""What a model answered, one small file per call, so that no call is paid for twice: not after a crash, not by another recipe.
A failed call is kept as well, with whether and how often it may be tried again."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

TRIES = 3
"""How often a call may fail for a passing reason before its failure counts as its answer."""


class CallFailed(RuntimeError):
    """One call gave no usable answer. `transient` says that the same call may succeed later (a time-out, a busy server);
    otherwise it would fail again (a malformed answer, a refused input)."""

    def __init__(self, message: str, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything that decides an answer. `model` is the digest of the weights (or the name that an endpoint serves),
    `settings` how text is generated, `inputs` the ids of images or other content that go in, in order."""

    kind: str
    model: str
    prompt: str
    settings: Mapping[str, Any]
    inputs: tuple[str, ...]

    def key(self) -> str:
        """sha256 in hex over all of it."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Response:
    """`value` is what the model said; where `error` is set there is none, and `retry` says that a later run asks again."""

    value: Any = None
    error: str | None = None
    retry: bool = False


class Responses:
    """The kept answers below one folder. Any number of processes may read and write: a file appears whole or not at all.

    Two processes that make the very same call at the same moment both pay for it; a refresh holds the lake's lock and cuts
    its work into disjoint tasks, so that does not happen within it.
    """

    def __init__(self, root: Path | str, tries: int = TRIES) -> None:
        self.root = Path(root)
        self.tries = tries

    def find(self, call: Call) -> Response | None:
        """The settled answer to `call`; None where the model must be asked (never asked, or failed and may be tried again)."""
        kept = self._read(call)
        if kept is None or (kept["transient"] and kept["tries"] < self.tries):
            return None
        return Response(kept["value"], kept["error"])

    def keep(self, call: Call, value: Any) -> Response:
        """Store an answer (plain JSON)."""
        self._write(call, value=value, error=None, transient=False, tries=1)
        return Response(value)

    def keep_failure(self, call: Call, failure: CallFailed) -> Response:
        """Store a failure; a passing one counts up."""
        before = self._read(call)
        tries = 1 + (before["tries"] if before is not None and before["transient"] else 0)
        error = str(failure)[:500]
        self._write(call, value=None, error=error, transient=failure.transient, tries=tries)
        return Response(None, error, failure.transient and tries < self.tries)

    def answer(self, call: Call, ask: Callable[[], Any]) -> Response:
        """The kept answer, or that of `ask()`, which may raise CallFailed. Any other error of `ask` is passed on and kept
        nowhere, for it says that the run is wrong and not this call."""
        found = self.find(call)
        if found is not None:
            return found
        try:
            value = ask()
        except CallFailed as failure:
            return self.keep_failure(call, failure)
        return self.keep(call, value)

    def forget(self, inputs: Iterable[str]) -> int:
        """Delete every answer that any of these inputs went into. Returns how many. Reads the whole cache once."""
        gone, wanted = 0, set(inputs)
        for path in self.root.glob("??/*.json"):
            kept = _load(path)
            if kept is not None and wanted & set(kept["inputs"]):
                path.unlink(missing_ok=True)
                gone += 1
        return gone

    def _path(self, call: Call) -> Path:
        key = call.key()
        return self.root / key[:2] / f"{key}.json"

    def _read(self, call: Call) -> dict[str, Any] | None:
        return _load(self._path(call))

    def _write(self, call: Call, **outcome: Any) -> None:
        write_whole(self._path(call), json.dumps({**dataclasses.asdict(call), **outcome}, ensure_ascii=False).encode())


def write_whole(path: Path, payload: bytes) -> None:
    """Write a file that appears whole or not at all, in a folder that is made where it is not there; a killed process leaves at
    most a hidden draft ending in .tmp."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        draft.write_bytes(payload)
        os.replace(draft, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()


def responses_folder(lake_files: Path) -> Path:
    """Where a lake whose `files/` this is keeps what models answered."""
    return lake_files / "cache" / "responses"


def _load(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # a file that a power cut left torn is no answer
        return None
