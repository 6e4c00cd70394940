"""Group images that show the same pixels or nearly the same picture, comparing only new images with all known ones.
Works on hashes alone, from `op_quality` and from its own table: never on a pixel, and never on all ids at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from dreamlite_data import schema
from dreamlite_data.operators.grouping import NONE, Links, Membership, join_groups
from dreamlite_data.operators.hamming import pairs_between, pairs_within

NEAR_RADIUS_BITS = 3
NEAR_MIN_SIDE_PX = 128  # the hash of a tiny drawing says too little: different scenes would meet

Portions = Callable[[Sequence[str]], Iterable[pa.Table]]
"""Gives the named columns of the new images in portions, sorted by subject_id, as often as it is called."""


@dataclasses.dataclass(frozen=True)
class History:
    """Images grouped so far: `phash` uint64 [M] of those that are compared by it, in any order; `pixels`, a table of group_id and
    pixel_hash with each that a new image has too; and `groups`, which gives a table of group_id and phash with the lowest group at each
    of some of these hashes."""

    phash: np.ndarray
    pixels: pa.Table
    groups: Callable[[np.ndarray], pa.Table]


@dataclasses.dataclass(frozen=True)
class Prints:
    """What the new images that could be measured are compared by, in the order of their ids: `pixels` uint64 [N, 2], a hash of the
    name of their pixels; `phash` uint64 [N]; and `large` bool [N], whether they are compared by it."""

    pixels: np.ndarray
    phash: np.ndarray
    large: np.ndarray


class Duplicates:
    """Runs on the driver over narrow rows: it needs all hashes at once, some 25 bytes an image, and reads ids as it writes.
    `grouping.join_groups` states the rule by which groups form; rows may come in any order. Two images of equal pixels are alike at
    any size, by their hash only large ones."""

    name = "duplicates"
    version = 2
    reads = ("subject_id", "pixel_hash", "phash", "min_side_px")
    table = "op_duplicates"
    resources = {"num_cpus": 1.0}
    schema = schema.OPERATORS["op_duplicates"]

    def __init__(self, history: History) -> None:
        self._history = history

    @staticmethod
    def config() -> dict[str, Any]:
        return {"radius_bits": NEAR_RADIUS_BITS, "min_side_px": NEAR_MIN_SIDE_PX}

    def __call__(self, rows: pa.Table) -> pa.Table:
        ordered = rows.sort_by("subject_id")
        return pa.concat_tables([self.schema.empty_table(), *self.portions(lambda columns: [ordered.select(columns)])])

    def portions(self, read: Portions) -> Iterator[pa.Table]:
        """The rows of each portion of the new images, sorted by subject_id."""
        prints = _prints(read(self.reads[1:]))
        original = _first_of_equal(prints.pixels)
        names, known, distance, seen = self._nearest_known(prints)
        found = join_groups(len(original), _links_among(original, prints), known, distance)
        opened = found.opener == np.arange(len(original))
        pixels = seen | (~opened & (original != np.arange(len(original))))
        kind = np.where(opened, 0, np.where(pixels, 1, 2)).astype(np.int8)
        del prints, original, seen
        yield from _written(read, found, kind, names)

    def _nearest_known(self, prints: Prints) -> tuple[pa.Array, np.ndarray, np.ndarray, np.ndarray]:
        """Names of the groups of the history that new images meet, sorted; for each image the number of its group among them
        (NONE without one) and the distance; and whether its very pixels are known."""
        places = np.flatnonzero(prints.large)
        distinct, inverse = np.unique(prints.phash[places], return_inverse=True)
        new, old, bits = pairs_between(distinct, self._history.phash, NEAR_RADIUS_BITS)
        met = self._history.phash[old]
        groups, same = self._history.groups(np.unique(met)), self._history.pixels
        names = pc.unique(pa.chunked_array([*groups["group_id"].chunks, *same["group_id"].chunks], pa.string())).sort()
        known, distance = np.full(len(prints.phash), NONE), np.zeros(len(prints.phash))
        if len(new):
            groups = groups.sort_by("phash")
            at = pc.index_in(groups["group_id"], value_set=names).to_numpy()[np.searchsorted(groups["phash"].to_numpy(), met)]
            order = np.lexsort((at, bits, new))
            hit, first = np.unique(new[order], return_index=True)
            best = np.full(len(distinct), NONE)
            best[hit] = order[first]
            near = best[inverse] != NONE
            known[places[near]], distance[places[near]] = at[best[inverse[near]]], bits[best[inverse[near]]]
        original = _first_of_equal(np.concatenate([prints.pixels, _pixel_prints(same["pixel_hash"])]))
        group = np.full(len(original), NONE)
        group[original[len(known) :]] = pc.index_in(same["group_id"], value_set=names).to_numpy()
        group = group[original[: len(known)]]  # all of equal pixels are in one group
        seen = group != NONE
        known[seen], distance[seen] = group[seen], 0
        return names, known, distance, seen


def _prints(portions: Iterable[pa.Table]) -> Prints:
    pixels, phash, large = [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.uint64)], [np.zeros(0, bool)]
    for portion in portions:
        portion = portion.filter(pc.is_valid(portion["pixel_hash"]))
        pixels.append(_pixel_prints(portion["pixel_hash"]))
        phash.append(portion["phash"].to_numpy())
        large.append(portion["min_side_px"].to_numpy() >= NEAR_MIN_SIDE_PX)
    return Prints(np.concatenate(pixels), np.concatenate(phash), np.concatenate(large))


def _pixel_prints(names: pa.ChunkedArray) -> np.ndarray:
    """uint64 [N, 2]: names of any length in 16 bytes, by the 128-bit hash that made the names."""
    return np.frombuffer(b"".join(map(xxhash.xxh3_128_digest, names.cast(pa.binary()).to_pylist())), np.uint64).reshape(-1, 2)


def _first_of_equal(pixels: np.ndarray) -> np.ndarray:
    """For each of [N, 2] the place of the first equal one."""
    order = np.lexsort((pixels[:, 0], pixels[:, 1]))  # stable: of equal ones the first place comes first
    starts = np.ones(len(order), bool)
    starts[1:] = (pixels[order[1:]] != pixels[order[:-1]]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[starts][np.cumsum(starts) - 1]
    return first


def _links_among(original: np.ndarray, prints: Prints) -> Links:
    """Links between new images, of which `original` names the first of equal pixels. Of equal ones each is tied to the first
    only: one link apiece keeps them together, where all pairs would be quadratic."""
    repeated = original != np.arange(len(original))
    places = np.flatnonzero(prints.large & ~repeated)
    distinct, first, inverse = np.unique(prints.phash[places], return_index=True, return_inverse=True)
    twin = first[inverse] != np.arange(len(places))
    one, other, bits = pairs_within(distinct, NEAR_RADIUS_BITS)
    left = np.concatenate([original[repeated], places[first[inverse[twin]]], places[first[one]]])
    right = np.concatenate([np.flatnonzero(repeated), places[twin], places[first[other]]])
    distance = np.concatenate([np.zeros(repeated.sum() + twin.sum()), bits])
    return Links(left, right, distance)


def _written(read: Portions, found: Membership, kind: np.ndarray, names: pa.Array) -> Iterator[pa.Table]:
    """The rows of each portion. `kind` int8 [N] is the place in first, pixels, near; `names` are those of the known groups."""
    founders = np.unique(found.opener[(found.opener != NONE) & (found.opener != np.arange(len(kind)))])
    founder_ids = _ids_at(read(("subject_id", "pixel_hash")), founders)
    kinds, begin = pa.array(["first", "pixels", "near"], pa.string()), 0
    for portion in read(Duplicates.reads):
        measured = pc.is_valid(portion["pixel_hash"])
        bad = portion["subject_id"].filter(pc.invert(measured))
        failed = pa.table({"subject_id": bad, "error": pa.array(["the image could not be measured"] * len(bad), pa.string())})
        rows = portion.filter(measured)
        part = slice(begin, begin := begin + len(rows))
        opener, joined = found.opener[part], found.known[part]
        follows = (opener != NONE) & (opener != np.arange(part.start, part.stop))
        founder = pa.array(np.searchsorted(founders, opener), mask=~follows)
        grouped = schema.conform(Duplicates.table, pa.table({
            "subject_id": rows["subject_id"],
            "group_id": pc.coalesce(names.take(pa.array(joined, mask=joined == NONE)), founder_ids.take(founder), rows["subject_id"]),
            "kind": kinds.take(pa.array(kind[part])),
            "distance": pa.array(np.where(kind[part] == 1, 0, found.distance[part]).astype(np.int32)),
            "pixel_hash": rows["pixel_hash"],
            "phash": pa.array(rows["phash"].to_numpy(), pa.uint64(), mask=rows["min_side_px"].to_numpy() < NEAR_MIN_SIDE_PX),
        }))  # fmt: skip
        yield pa.concat_tables([grouped, schema.conform(Duplicates.table, failed)]).sort_by("subject_id")


def _ids_at(portions: Iterable[pa.Table], places: np.ndarray) -> pa.Array:
    """Ids of the images at ascending `places`, counted over those that could be measured."""
    found, begin = [], 0
    for portion in portions:
        ids = portion.filter(pc.is_valid(portion["pixel_hash"]))["subject_id"]
        first, last = np.searchsorted(places, (begin, begin + len(ids)))
        found += ids.take(pa.array(places[first:last] - begin)).chunks
        begin += len(ids)
    return pa.chunked_array(found, pa.string()).combine_chunks()
