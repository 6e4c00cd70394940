"""Group images that show the same pixels or nearly the same picture, comparing only new images with all known ones.
Groups grow and never merge, so a group's id stays valid for as long as the lake lives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from dreamlite_data import schema

NEAR_RADIUS_BITS = 3
NEAR_MIN_SIDE_PX = 128  # the hash of a tiny drawing says too little: different scenes would meet
BANDS = 4  # with radius 3 one of four 16-bit bands must be equal (pigeonhole), so no pair is missed


class Duplicates:
    """Runs on the driver over narrow rows: it needs all hashes at once and never a pixel."""

    name = "duplicates"
    version = 1
    reads = ("subject_id", "pixel_sha256", "phash", "min_side_px")
    table = "op_duplicates"
    resources = {"num_cpus": 1.0}
    schema = schema.OPERATORS["op_duplicates"]

    def __init__(self, known: pa.Table) -> None:
        """`known` are the images grouped so far: the columns of `reads` and group_id."""
        self._by_pixels: dict[str, str] = dict(
            zip(known["pixel_sha256"].to_pylist(), known["group_id"].to_pylist(), strict=True)
        )
        self._index = _HashIndex()
        for phash, side, group in zip(
            known["phash"].to_pylist(), known["min_side_px"].to_pylist(), known["group_id"].to_pylist(), strict=True
        ):
            if side >= NEAR_MIN_SIDE_PX:
                self._index.add(phash, group)

    @staticmethod
    def config() -> dict[str, Any]:
        return {"radius_bits": NEAR_RADIUS_BITS, "min_side_px": NEAR_MIN_SIDE_PX}

    def __call__(self, rows: pa.Table) -> pa.Table:
        answers = []
        for row in rows.sort_by("subject_id").to_pylist():
            if row["pixel_sha256"] is None:
                answers.append({"subject_id": row["subject_id"], "error": "the image could not be measured"})
                continue
            group, kind, distance = self._by_pixels.get(row["pixel_sha256"]), "pixels", 0
            large = row["min_side_px"] >= NEAR_MIN_SIDE_PX
            if group is None and large:
                kind = "near"
                group, distance = self._index.nearest(row["phash"])
            if group is None:
                group, kind, distance = row["subject_id"], "first", 0
            self._by_pixels.setdefault(row["pixel_sha256"], group)
            if large:
                self._index.add(row["phash"], group)
            answers.append({"subject_id": row["subject_id"], "group_id": group, "kind": kind, "distance": distance})
        return pa.Table.from_pylist(answers, schema=self.schema)


class _HashIndex:
    """64-bit hashes, findable within NEAR_RADIUS_BITS bits through equal bands."""

    def __init__(self) -> None:
        self._bands: list[dict[int, list[int]]] = [{} for _ in range(BANDS)]
        self._hashes: list[int] = []
        self._groups: list[str] = []

    def add(self, phash: int, group: str) -> None:
        place = len(self._hashes)
        self._hashes.append(phash)
        self._groups.append(group)
        for band in range(BANDS):
            self._bands[band].setdefault((phash >> (16 * band)) & 0xFFFF, []).append(place)

    def nearest(self, phash: int) -> tuple[str | None, int]:
        """Group and distance in bits of the nearest hash within the radius; the lowest group id of equally near ones."""
        places = {
            place for band in range(BANDS) for place in self._bands[band].get((phash >> (16 * band)) & 0xFFFF, ())
        }
        if not places:
            return None, 0
        order = sorted(places)
        bits = np.bitwise_count(np.array([self._hashes[place] for place in order], dtype=np.uint64) ^ np.uint64(phash))
        near = [(int(bit), self._groups[place]) for bit, place in zip(bits, order, strict=True) if bit <= NEAR_RADIUS_BITS]
        if not near:
            return None, 0
        distance, group = min(near)
        return group, distance
