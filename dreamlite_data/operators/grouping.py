"""Put new rows into groups of alike ones, beside the groups that are there: groups grow, never merge, and keep their ids.
What "alike" means, and how alike pairs are found, is the caller's."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

NONE = -1


@dataclasses.dataclass(frozen=True)
class Links:
    """Alike pairs of rows: places `left` and `right` [E], and the `distance` between them."""

    left: np.ndarray
    right: np.ndarray
    distance: np.ndarray

    def between(self, rows: np.ndarray) -> Links:
        """Those that tie two of `rows`, a mask [N]."""
        inside = rows[self.left] & rows[self.right]
        return Links(self.left[inside], self.right[inside], self.distance[inside])


@dataclasses.dataclass(frozen=True)
class Membership:
    """Per row: the number of the `known` group it joined, or NONE and the place of the row whose new group it is in
    (`opener`, its own for the one that opened it); and the `distance` of the link that brought it, 0 for an opener."""

    known: np.ndarray
    opener: np.ndarray
    distance: np.ndarray


def join_groups(count: int, links: Links, known: np.ndarray, known_distance: np.ndarray) -> Membership:
    """Groups of `count` rows that are sorted by id. `known` [N] is the number of the group of the nearest earlier row, in the
    order of the groups' names, or NONE where no earlier row is alike; `known_distance` [N] is how far that row is.

    The rule: a row that is alike to an earlier row joins the group of the nearest one, the lowest group among equally near
    ones. Who is alike only to rows that came with it joins theirs, over the nearest link. Rows that nothing ties to an earlier
    one found a group with all that hang together with them, named after the lowest id. So groups are the connected components
    of "alike", whatever the order of arrival and however it was cut, with one exception: where a later row ties two
    groups together, both stay, and the row is in the nearer one.
    """
    known, distance = known.copy(), known_distance.astype(np.float64)
    _spread(known, distance, links)
    fresh = known == NONE
    links = links.between(fresh)
    opener = np.where(fresh, np.arange(count), NONE)
    tied = np.zeros(count, bool)
    tied[links.left] = tied[links.right] = True
    places = np.flatnonzero(tied)
    if len(places):
        number = np.cumsum(tied) - 1
        pairs = (np.ones(len(links.left), bool), (number[links.left], number[links.right]))
        _, component = csgraph.connected_components(sparse.coo_matrix(pairs, shape=(len(places),) * 2), directed=False)
        _, first = np.unique(component, return_index=True)  # rows are sorted by id, so the first of a component is the lowest
        opener[places] = NONE
        opener[places[first]] = places[first]
        _spread(opener, distance, links)
    return Membership(known, opener, distance)


def _spread(group: np.ndarray, distance: np.ndarray, links: Links) -> None:
    """Carry groups along links to rows without one, in place and wave by wave: the nearest link decides, then the lowest group."""
    start, end = np.concatenate([links.left, links.right]), np.concatenate([links.right, links.left])
    length = np.concatenate([links.distance, links.distance])
    while True:
        waiting = group[end] == NONE
        start, end, length = start[waiting], end[waiting], length[waiting]
        ready = np.flatnonzero(group[start] != NONE)
        if not len(ready):
            return
        order = ready[np.lexsort((group[start[ready]], length[ready], end[ready]))]
        reached, first = np.unique(end[order], return_index=True)
        group[reached], distance[reached] = group[start[order[first]]], length[order[first]]
