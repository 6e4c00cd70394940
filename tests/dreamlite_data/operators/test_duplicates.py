"""Duplicates: every pair within the radius is found, groups do not depend on order or batches, and never merge or rename."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from dreamlite_data.operators.duplicates import Duplicates, History
from dreamlite_data.operators.hamming import pairs_between, pairs_within

Entry = tuple[str, str, int, int]


def _rows(entries: list[Entry]) -> pa.Table:
    names = ("subject_id", "pixel_hash", "phash", "min_side_px")
    types = (pa.string(), pa.string(), pa.uint64(), pa.int32())
    columns = zip(*entries, strict=True) if entries else ((),) * 4
    return pa.table({name: pa.array(column, kind) for name, column, kind in zip(names, columns, types, strict=True)})


NOBODY = pa.table({"group_id": pa.array([], pa.string()), "pixel_hash": pa.array([], pa.string()), "phash": pa.array([], pa.uint64())})


def _history(known: pa.Table, rows: pa.Table) -> History:
    """The groups of `known` as the lake gives them (comparisons.grouped_before), from a table."""

    def lowest(key: str, values: pa.Array) -> pa.Table:
        found = known.filter(pc.is_in(known[key], value_set=values)).group_by(key).aggregate([("group_id", "min")])
        return found.rename_columns({"group_id_min": "group_id"})

    return History(
        known["phash"].drop_null().to_numpy(), lowest("pixel_hash", rows["pixel_hash"].combine_chunks()), lambda hashes: lowest("phash", pa.array(hashes))
    )


def _after(batches: list[list[Entry]]) -> dict[str, tuple[str, str, int]]:
    """Group, kind and distance of each subject when the batches come one after the other."""
    known, answer = NOBODY, {}
    for batch in batches:
        found = Duplicates(_history(known, _rows(batch)))(_rows(batch))
        answer |= {row["subject_id"]: (row["group_id"], row["kind"], row["distance"]) for row in found.to_pylist()}
        known = pa.concat_tables([known, found.select(known.column_names)])
    return answer


def test_grouped_by_pixels_at_any_size_and_by_hash_only_where_large() -> None:
    assert _after([[
        ("a", "p1", 0b0, 64), ("b", "p1", 0b0, 64), ("c", "p2", 0b1, 64),
        ("d", "p3", 0xF0F0, 256), ("e", "p4", 0xF0F1, 256), ("f", "p5", 0xFFFFFFFF, 256),
    ]]) == {
        "a": ("a", "first", 0), "b": ("a", "pixels", 0), "c": ("c", "first", 0), "d": ("d", "first", 0), "e": ("d", "near", 1),
        "f": ("f", "first", 0),
    }  # fmt: skip


def test_new_images_join_old_groups_and_never_rename_them() -> None:
    found = _after([[("m", "p1", 0b0, 256)], [("a", "p1", 0b0, 256), ("b", "p2", 0b11, 256)]])
    assert found == {"m": ("m", "first", 0), "a": ("m", "pixels", 0), "b": ("m", "near", 2)}


def test_a_row_between_two_groups_goes_to_the_nearer_and_both_stay() -> None:
    apart = [("m", "p1", 0b0, 256), ("k", "p2", 0b11111, 256)]
    found = _after([apart, [("x", "p3", 0b11, 256)], [("y", "p4", 0b10111, 256)]])
    assert found["m"][0] == "m" and found["k"][0] == "k"
    assert found["x"] == ("m", "near", 2) and found["y"] == ("k", "near", 1)
    assert {row[0] for row in _after([[*apart, ("x", "p3", 0b11, 256)]]).values()} == {"k"}  # at once they hang together


def test_an_image_that_could_not_be_measured_is_a_row_with_an_error() -> None:
    rows = pa.concat_tables([_rows([("b", "p", 1, 256)]), pa.table({"subject_id": ["a"]})], promote_options="default")
    answer = Duplicates(_history(NOBODY, rows))(rows).to_pylist()
    assert [(row["subject_id"], row["group_id"], row["error"] is None) for row in answer] == [("a", None, False), ("b", "b", True)]


def _planted(rng: np.random.Generator, clusters: int, chain: int) -> list[Entry]:
    """Clusters whose members each differ from the one before by up to three bits; some members repeat its pixels."""
    entries = []
    for cluster in range(clusters):
        value = int(rng.integers(0, 2**63))
        for member in range(chain):
            if member and rng.random() < 0.7:
                for bit in rng.choice(64, rng.integers(0, 4), replace=False):
                    value ^= 1 << int(bit)
            entries.append((f"{int(rng.integers(0, 2**60)):016x}", f"p{cluster}.{value}", value, 256))
    return entries


def test_groups_do_not_depend_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(0)
    entries = _planted(rng, 60, 5)
    first = _after([entries])
    assert len({group for group, _, _ in first.values()}) < 0.5 * len(entries)
    for _ in range(3):
        assert _after([[entries[index] for index in rng.permutation(len(entries))]]) == first


def test_groups_do_not_depend_on_how_arrival_is_cut_where_nothing_is_bridged() -> None:
    rng = np.random.default_rng(1)
    base = [(f"b{n:03d}", f"p{n}", int(value), 256) for n, value in enumerate(rng.integers(0, 2**63, 100, dtype=np.uint64))]
    near = [(f"n{n:03d}", f"q{n}", entry[2] ^ (1 << int(rng.integers(64))), 256) for n, entry in enumerate(base)]

    def partition(found: dict[str, tuple]) -> set[frozenset[str]]:
        groups: dict[str, set[str]] = {}
        for subject, (group, _, _) in found.items():
            groups.setdefault(group, set()).add(subject)
        return {frozenset(members) for members in groups.values()}

    together = partition(_after([[*base, *near]]))
    assert len(together) == 100
    mixed = [(base + near)[index] for index in rng.permutation(200)]
    assert partition(_after([near, base])) == partition(_after([mixed[:7], mixed[7:120], mixed[120:]])) == together


@pytest.mark.parametrize("radius", [0, 1, 3, 5])
def test_every_pair_within_the_radius_is_found_and_no_other(radius: int) -> None:
    rng = np.random.default_rng(2)
    values = rng.integers(0, 2**64, 300, dtype=np.uint64)
    near = values ^ np.array([sum(1 << int(bit) for bit in rng.choice(64, rng.integers(1, 8), replace=False)) for _ in values], np.uint64)
    crowded = np.uint64(0xABCD) + (rng.integers(0, 2**10, 150, dtype=np.uint64) << np.uint64(54))  # three bands of four are equal
    hashes = np.unique(np.concatenate([values, near, crowded]))
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None])
    left, right = np.nonzero(np.triu(bits <= radius, 1))
    found = pairs_within(hashes, radius)
    assert list(zip(*(part.tolist() for part in found), strict=True)) == list(zip(left, right, bits[left, right], strict=True))
    assert radius == 0 or len(left) > 100
    one, other = hashes[:200], hashes[150:]
    across = np.bitwise_count(one[:, None] ^ other[None])
    expected = [(i, j, across[i, j]) for i, j in zip(*np.nonzero(across <= radius), strict=True)]
    assert list(zip(*(part.tolist() for part in pairs_between(one, other, radius)), strict=True)) == expected
    swapped = pairs_between(other, one, radius)
    assert sorted(zip(swapped[1].tolist(), swapped[0].tolist(), swapped[2].tolist(), strict=True)) == expected


def test_rows_do_not_depend_on_the_portions_in_which_they_are_read() -> None:
    rng = np.random.default_rng(3)
    known = Duplicates(_history(NOBODY, _rows([])))(_rows(_planted(rng, 30, 2)))
    failed = pa.table({"subject_id": [f"{number}f" for number in range(9)]})
    rows = pa.concat_tables([_rows(_planted(rng, 60, 5)), failed], promote_options="default").sort_by("subject_id")
    history = _history(known, rows)
    whole = Duplicates(history)(rows)
    assert set(whole["kind"].to_pylist()) == {"first", "pixels", "near", None}
    for size in (1, 7, 100):
        read = lambda columns, size=size: [rows.select(columns).slice(start, size) for start in range(0, len(rows), size)]  # noqa: E731
        assert pa.concat_tables(Duplicates(history).portions(read)).equals(whole)


def test_a_crowd_of_one_hash_costs_one_link_each() -> None:
    entries = [(f"{n:05d}", f"p{n}", 7, 256) for n in range(20_000)]
    found = _after([entries, [("00000x", "new", 5, 256)]])
    assert {group for group, _, _ in found.values()} == {"00000"} and found["00000x"] == ("00000", "near", 1)
