"""Group images that show the same pixels or nearly the same picture, comparing only new images with all known ones.
Works on columns alone: hashes from `op_quality`, earlier groups from its own table, and never a pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dreamlite_data import schema
from dreamlite_data.operators.grouping import NONE, Links, join_groups
from dreamlite_data.operators.hamming import pairs_between, pairs_within

NEAR_RADIUS_BITS = 3
NEAR_MIN_SIDE_PX = 128  # the hash of a tiny drawing says too little: different scenes would meet


class Duplicates:
    """Runs on the driver over narrow rows: it needs all hashes at once. `grouping.join_groups` states the rule by which groups
    form; rows may come in any order. Two images of equal pixels are alike at any size, by their hash only large ones."""

    name = "duplicates"
    version = 2
    reads = ("subject_id", "pixel_hash", "phash", "min_side_px")
    table = "op_duplicates"
    resources = {"num_cpus": 1.0}
    schema = schema.OPERATORS["op_duplicates"]

    def __init__(self, known: pa.Table) -> None:
        """`known` are the images grouped so far: group_id, pixel_hash, and phash, null where it is not to be compared."""
        self._known = known

    @staticmethod
    def config() -> dict[str, Any]:
        return {"radius_bits": NEAR_RADIUS_BITS, "min_side_px": NEAR_MIN_SIDE_PX}

    def __call__(self, rows: pa.Table) -> pa.Table:
        bad = rows["subject_id"].filter(pc.is_null(rows["pixel_hash"]))
        failed = pa.table({"subject_id": bad, "error": pa.array(["the image could not be measured"] * len(bad), pa.string())})
        found = self._group(rows.filter(pc.is_valid(rows["pixel_hash"])).sort_by("subject_id"))
        return pa.concat_tables([found, schema.conform(self.table, failed)]).sort_by("subject_id")

    def _group(self, rows: pa.Table) -> pa.Table:
        ids, keys, phash = rows["subject_id"].combine_chunks(), rows["pixel_hash"].combine_chunks(), rows["phash"].to_numpy()
        large = rows["min_side_px"].to_numpy() >= NEAR_MIN_SIDE_PX
        links, repeated = _links_among(keys, phash, large)
        names, known, distance, seen = self._nearest_known(keys, phash, large)
        found = join_groups(len(rows), links, known, distance)
        opened = found.opener == np.arange(len(rows))
        pixels = seen | (repeated & ~opened)
        founder = pa.array(np.where(found.opener < 0, 0, found.opener), mask=found.opener < 0)
        joined = pa.array(np.where(found.known < 0, 0, found.known), mask=found.known < 0)
        return schema.conform(self.table, pa.table({
            "subject_id": ids,
            "group_id": pc.coalesce(names.take(joined), ids.take(founder)),
            "kind": pa.array(["first", "pixels", "near"], pa.string()).take(pa.array(np.where(opened, 0, np.where(pixels, 1, 2)))),
            "distance": pa.array(np.where(pixels, 0, found.distance).astype(np.int32)),
            "pixel_hash": keys,
            "phash": pa.array(phash, pa.uint64(), mask=~large),
        }))  # fmt: skip

    def _nearest_known(self, keys: pa.Array, phash: np.ndarray, large: np.ndarray) -> tuple[pa.Array, np.ndarray, np.ndarray, np.ndarray]:
        """Names of the groups of the history that new rows meet, sorted; for each row the number of its group among them
        (NONE without one) and the distance; and whether its very pixels are known."""
        history = self._known["phash"].combine_chunks()
        comparable = np.flatnonzero(history.is_valid().to_numpy(zero_copy_only=False))
        places = np.flatnonzero(large)
        distinct, inverse = np.unique(phash[places], return_inverse=True)
        new, old, bits = pairs_between(distinct, history.drop_null().to_numpy(), NEAR_RADIUS_BITS)
        same = self._known.filter(pc.is_in(self._known["pixel_hash"], value_set=keys))
        met = pa.concat_arrays([
            self._known["group_id"].take(pa.array(comparable[old])).combine_chunks(), same["group_id"].combine_chunks()
        ])  # fmt: skip
        names = pc.unique(met).sort()
        number = pc.index_in(met, value_set=names).to_numpy()
        known, distance = np.full(len(keys), NONE), np.zeros(len(keys))
        if len(new):
            order = np.lexsort((number[: len(new)], bits, new))
            hit, first = np.unique(new[order], return_index=True)
            best = np.full(len(distinct), NONE)
            best[hit] = order[first]
            near = best[inverse] != NONE
            known[places[near]], distance[places[near]] = number[best[inverse[near]]], bits[best[inverse[near]]]
        at = pc.index_in(keys, value_set=same["pixel_hash"].combine_chunks())  # all of equal pixels are in one group
        seen = at.is_valid().to_numpy(zero_copy_only=False)
        known[seen], distance[seen] = number[len(new) :][at.drop_null().to_numpy()], 0
        return names, known, distance, seen


def _links_among(keys: pa.Array, phash: np.ndarray, large: np.ndarray) -> tuple[Links, np.ndarray]:
    """Links between new rows, and which of them repeat the pixels of a lower id. Of equal ones each is tied to the first
    only: one link apiece keeps them together, where all pairs would be quadratic."""
    code = keys.dictionary_encode().indices.to_numpy()
    _, first = np.unique(code, return_index=True)
    original = first[code]
    repeated = original != np.arange(len(keys))
    places = np.flatnonzero(large & ~repeated)
    distinct, first, inverse = np.unique(phash[places], return_index=True, return_inverse=True)
    twin = first[inverse] != np.arange(len(places))
    one, other, bits = pairs_within(distinct, NEAR_RADIUS_BITS)
    left = np.concatenate([original[repeated], places[first[inverse[twin]]], places[first[one]]])
    right = np.concatenate([np.flatnonzero(repeated), places[twin], places[first[other]]])
    distance = np.concatenate([np.zeros(repeated.sum() + twin.sum()), bits])
    return Links(left, right, distance), repeated
