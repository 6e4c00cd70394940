"""Every pair of 64-bit hashes that differ in at most a few bits, found through equal bands and never by sampling.
If r + 1 bands make up a hash, two hashes within r bits are equal in one of them (pigeonhole), so no pair is missed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

HASH_BITS = 64
MIN_BANDS = 4  # 16 bits each: more bands than the radius needs would only add candidates
CANDIDATES_AT_ONCE = 4_000_000

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Places on the left, places on the right, bits in which they differ."""


def pairs_within(hashes: np.ndarray, radius_bits: int) -> Pairs:
    """All pairs left < right of distinct uint64 [N] within the radius. Equal hashes are the caller's to collapse, for n equal
    ones would be n^2 / 2 pairs that say nothing."""
    found = []
    for low, high in _bands(radius_bits):
        band = _band(hashes, low, high)
        order = np.argsort(band, kind="stable")
        band, sorted_hashes = band[order], hashes[order]
        start, step = np.arange(len(hashes)), 1
        while True:  # compare each hash with the next, the next but one, ... of its band
            start = start[: np.searchsorted(start, len(hashes) - step)]
            start = start[band[start] == band[start + step]]
            if not len(start):
                break
            bits = np.bitwise_count(sorted_hashes[start] ^ sorted_hashes[start + step])
            near = bits <= radius_bits
            found.append((order[start[near]], order[start[near] + step], bits[near]))
            step += 1
    left, right, bits = _joined(found)
    left, right = np.minimum(left, right), np.maximum(left, right)
    return _each_once(left, right, bits, len(hashes))


def pairs_between(new: np.ndarray, known: np.ndarray, radius_bits: int) -> Pairs:
    """All pairs (place in `new`, place in `known`) within the radius; uint64 [N] and [M]. The shorter side is indexed and the
    longer one streamed past it, so ten thousand against a million cost one reading of the million."""
    if len(new) > len(known):
        right, left, bits = pairs_between(known, new, radius_bits)
        return left, right, bits
    found = []
    for low, high in _bands(radius_bits) if len(new) else ():
        band = _band(new, low, high)
        order = np.argsort(band, kind="stable")
        counts = np.bincount(band, minlength=1 << (high - low))
        starts = np.cumsum(counts) - counts
        other = _band(known, low, high)
        meeting = np.flatnonzero(counts[other])
        for places in _portions(meeting, counts[other[meeting]]):
            repeats = counts[other[places]]
            right = np.repeat(places, repeats)
            within = np.arange(len(right)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
            left = order[np.repeat(starts[other[places]], repeats) + within]
            bits = np.bitwise_count(new[left] ^ known[right])
            near = bits <= radius_bits
            found.append((left[near], right[near], bits[near]))
    return _each_once(*_joined(found), len(known))


def _bands(radius_bits: int) -> Iterator[tuple[int, int]]:
    edges = np.linspace(0, HASH_BITS, max(MIN_BANDS, radius_bits + 1) + 1).astype(int).tolist()
    return zip(edges, edges[1:], strict=False)


def _band(hashes: np.ndarray, low: int, high: int) -> np.ndarray:
    return ((hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)).astype(np.uint16)


def _portions(places: np.ndarray, repeats: np.ndarray) -> Iterator[np.ndarray]:
    """`places` in runs of about CANDIDATES_AT_ONCE candidates: memory stays bounded however crowded a band is."""
    ends = np.cumsum(repeats)
    cuts = np.searchsorted(ends, np.arange(CANDIDATES_AT_ONCE, ends[-1], CANDIDATES_AT_ONCE)) if len(ends) else []
    return (part for part in np.split(places, cuts) if len(part))


def _joined(found: list[Pairs]) -> Pairs:
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8)
    left, right, bits = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return left, right, bits


def _each_once(left: np.ndarray, right: np.ndarray, bits: np.ndarray, size: int) -> Pairs:
    """Sorted, and each pair once: near ones share more than one band."""
    _, first = np.unique(left.astype(np.int64) * max(1, size) + right, return_index=True)
    return left[first], right[first], bits[first]
