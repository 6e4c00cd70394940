"""Find what our data shares with benchmark sets: the same bytes or pixels, nearly the same picture, the same words, or a
canary string. Every subject gets a row, so that a dataset can prove that it was compared and with what."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dreamlite_data import images, schema
from dreamlite_data.operators.appearance import Appearance
from dreamlite_data.operators.duplicates import NEAR_MIN_SIDE_PX, NEAR_RADIUS_BITS
from dreamlite_data.operators.hamming import pairs_between
from dreamlite_data.settings import Benchmark

MIN_WORDS = 4
"""Shorter texts ("a red circle", "make it brighter") are said everywhere and prove nothing."""
ENTRIES = pa.schema([("benchmark", pa.string()), ("entry", pa.string()), ("kind", pa.string()), ("value", pa.string())])
KINDS = {"bytes": 0, "pixels": 1, "near": 2, "text": 3, "canary": 4}
"""What an entry is compared by; of several meetings the first kind is recorded."""
_COLUMNS = {
    "sha256": "bytes", "image_id": "bytes", "pixel_hash": "pixels", "phash": "near", "text": "text", "caption": "text", "prompt": "text",
    "instruction": "text", "canary": "canary", "guid": "canary",
}  # fmt: skip
_SHAPES = (
    ("bytes", re.compile(r"[0-9a-f]{64}")), ("pixels", re.compile(r"[0-9a-f]{48}")), ("near", re.compile(r"[0-9a-f]{16}")),
    ("canary", re.compile(r".*\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b.*")),
)  # fmt: skip
_GUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


class BenchmarkError(ValueError):
    """A benchmark cannot be read; the message says which, what is wrong and how to mend it."""


class Contamination:
    """Runs on the driver over narrow rows. `entries` (schema ENTRIES) is what to look for."""

    name = "contamination"
    version = 1
    table = "op_contamination"

    def __init__(self, entries: pa.Table) -> None:
        self.entries = entries

    def config(self) -> dict[str, Any]:
        return {"entries": entries_digest(self.entries), "radius_bits": NEAR_RADIUS_BITS, "min_side_px": NEAR_MIN_SIDE_PX, "min_words": MIN_WORDS}

    def of_images(self, rows: pa.Table) -> pa.Table:
        """Rows for images: subject_id, pixel_hash, phash, min_side_px (hashes null where the image could not be measured)."""
        found = [*self._equal(rows["subject_id"], "bytes"), *self._equal(rows["pixel_hash"], "pixels"), *self._near(rows)]
        return self._answer(rows["subject_id"], found)

    def of_texts(self, rows: pa.Table) -> pa.Table:
        """Rows for captions and instructions: subject_id, text, and plain, the text without case and punctuation."""
        long = pc.greater_equal(pc.count_substring(rows["plain"], " "), MIN_WORDS - 1)
        found = list(self._equal(pc.if_else(long, rows["plain"], None), "text"))
        lower = pc.utf8_lower(rows["text"])
        for place in np.flatnonzero(self._of("canary")):
            hits = pc.fill_null(pc.match_substring(lower, self.entries["value"][int(place)].as_py()), False)
            found += [(int(row), int(place), 0) for row in np.flatnonzero(hits.to_numpy())]
        return self._answer(rows["subject_id"], found)

    def _of(self, kind: str) -> np.ndarray:
        return pc.equal(self.entries["kind"], kind).to_numpy()

    def _equal(self, column: pa.ChunkedArray, kind: str) -> Iterator[tuple[int, int, int]]:
        """(row, entry, 0) where a value is an entry's; of equal entries the first."""
        places = np.flatnonzero(self._of(kind))
        values = self.entries["value"].take(pa.array(places)).combine_chunks()
        at = pc.index_in(column, value_set=values)
        rows = np.flatnonzero(at.is_valid().to_numpy())
        return zip(rows.tolist(), places[at.drop_null().to_numpy()].tolist(), [0] * len(rows), strict=True)

    def _near(self, rows: pa.Table) -> Iterator[tuple[int, int, int]]:
        places = np.flatnonzero(self._of("near"))
        hashes = np.array([int(value, 16) for value in self.entries["value"].take(pa.array(places)).to_pylist()], np.uint64)
        large = pc.fill_null(pc.and_(pc.is_valid(rows["phash"]), pc.greater_equal(rows["min_side_px"], NEAR_MIN_SIDE_PX)), False)
        subject = np.flatnonzero(large.to_numpy())
        one, other, bits = pairs_between(rows["phash"].filter(large).to_numpy(), hashes, NEAR_RADIUS_BITS)
        return zip(subject[one].tolist(), places[other].tolist(), bits.tolist(), strict=True)

    def _answer(self, subjects: pa.ChunkedArray, found: list[tuple[int, int, int]]) -> pa.Table:
        names = {name: self.entries[name].to_pylist() for name in ("benchmark", "entry", "kind")}
        best: dict[int, tuple] = {}
        for row, place, distance in found:
            kind = names["kind"][place]
            meeting = (KINDS[kind], distance, names["benchmark"][place], names["entry"][place], kind)
            best[row] = min(best.get(row, meeting), meeting)
        columns: dict[str, list] = {name: [None] * len(subjects) for name in ("benchmark", "entry", "kind", "distance")}
        for row, (_, distance, benchmark, entry, kind) in best.items():
            columns["benchmark"][row], columns["entry"][row], columns["kind"][row] = benchmark, entry, kind
            columns["distance"][row] = distance
        types = {name: schema.OPERATORS[self.table].field(name).type for name in columns}
        table = pa.table({"subject_id": subjects, **{name: pa.array(values, types[name]) for name, values in columns.items()}})
        return schema.conform(self.table, table)


def entries_digest(entries: pa.Table) -> str:
    """sha256 over the entries in their order."""
    return hashlib.sha256(json.dumps(entries.to_pylist(), sort_keys=True).encode()).hexdigest()[:16]


def read_benchmark(benchmark: Benchmark, digest: str, cache: Path) -> pa.Table:
    """Entries of a benchmark: of a folder every image (by bytes, pixels and perceptual hash) and the words beside it; of a
    .txt, .csv or .jsonl file every line. `digest` names its content: what was read once is kept in `cache` under it, so a
    refresh decodes no benchmark again. Raises BenchmarkError."""
    kept = cache / f"{benchmark.name}-{digest[:24]}.parquet"
    if kept.exists():
        return pq.read_table(kept).cast(ENTRIES)
    found = list(_of_folder(benchmark.path) if benchmark.path.is_dir() else _of_list(benchmark))
    if not found:
        raise BenchmarkError(f"the benchmark {benchmark.name!r} at {benchmark.path} holds nothing to compare with: correct refresh.benchmarks")
    rows = [{"benchmark": benchmark.name, "entry": entry, "kind": kind, "value": value} for entry, kind, value in found]
    entries = pa.Table.from_pylist(rows, schema=ENTRIES).sort_by([("entry", "ascending"), ("kind", "ascending"), ("value", "ascending")])
    cache.mkdir(parents=True, exist_ok=True)
    draft = kept.with_suffix(".tmp")
    pq.write_table(entries, draft)
    draft.replace(kept)
    return entries


def _of_folder(folder: Path) -> Iterator[tuple[str, str, str]]:
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        entry = file.relative_to(folder).as_posix()
        if file.suffix.lower() in (".txt", ".caption"):
            yield from _of_text(entry, file.read_text(encoding="utf-8", errors="replace"))
            continue
        payload = file.read_bytes()
        yield entry, "bytes", hashlib.sha256(payload).hexdigest()
        try:
            pixels = images.decode(payload).pixels
            look = Appearance()
            look.add(pixels)
        except ValueError:  # no image, or one too small: its bytes are compared all the same
            continue
        measured = look.measures()
        yield entry, "pixels", measured["pixel_hash"][0]
        if min(pixels.shape[:2]) >= NEAR_MIN_SIDE_PX:
            yield entry, "near", f"{int(measured['phash'][0]):016x}"


def _of_list(benchmark: Benchmark) -> Iterator[tuple[str, str, str]]:
    path, suffix = benchmark.path, benchmark.path.suffix.lower()
    if suffix not in (".txt", ".csv", ".jsonl"):
        raise BenchmarkError(f"the benchmark {benchmark.name!r} at {path} is neither a folder nor a .txt, .csv or .jsonl file")
    content = path.read_text(encoding="utf-8", errors="replace")
    if suffix == ".txt":
        for number, line in enumerate(content.splitlines(), 1):
            value = line.strip().lower()
            kind = next((kind for kind, shape in _SHAPES if shape.fullmatch(value)), "text")
            yield from _of_text(f"line {number}", line) if kind in ("text", "canary") else [(f"line {number}", kind, value)]
        return
    rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(content))) if suffix == ".csv" else list(_json_lines(benchmark, content))
    if not any(name in _COLUMNS for row in rows for name in row):
        raise BenchmarkError(
            f"the benchmark {benchmark.name!r} at {path} has none of the columns {', '.join(_COLUMNS)}: rename what should be compared"
        )
    for number, row in enumerate(rows, 1):
        entry = str(row.get("id") or f"line {number}")
        for name, value in row.items():
            kind = _COLUMNS.get(name)
            if not kind or not isinstance(value, str) or not value.strip():
                continue
            if kind == "text":
                yield from _of_text(entry, value)
            elif kind == "near" and not _SHAPES[2][1].fullmatch(value.strip().lower()):
                raise BenchmarkError(f"the benchmark {benchmark.name!r} at {path}, {entry}: {name} {value!r} is not a hash of 16 hex digits")
            else:
                yield entry, kind, value.strip().lower()


def _json_lines(benchmark: Benchmark, content: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BenchmarkError(f"the benchmark {benchmark.name!r} at {benchmark.path}, line {number}: {error}") from None
        if not isinstance(row, dict):
            raise BenchmarkError(f"the benchmark {benchmark.name!r} at {benchmark.path}, line {number}: not a JSON object")
        yield row


def _of_text(entry: str, text: str) -> Iterator[tuple[str, str, str]]:
    """The words, and every GUID in them: a canary is put into texts so that its owner can be found."""
    for guid in _GUID.findall(text.lower()):
        yield entry, "canary", guid
    if text.strip():
        yield entry, "text", text.strip()
