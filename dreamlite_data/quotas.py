"""How much of each edit type is wanted: the shares of a packaged mix, or a user's own, over places in the taxonomy.
The draw of edits aims at them (operators.edit_plan), and a policy may cap each type at its own (policies.quota)."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

from dreamlite_data.taxonomy import UNMAPPED, EditType, Taxonomy, load_taxonomy


class QuotaError(ValueError):
    """Shares that cannot be meant; the message says which and how to mend them."""


@dataclasses.dataclass(frozen=True)
class Quotas:
    """`shares` sum to 1. `members` are the types that count under each name: paths of level1, or of level1/level2."""

    shares: dict[str, float]
    members: dict[str, tuple[str, ...]]

    def name_of(self, kind: EditType) -> str | None:
        """The name under which a type counts; None where no share is set aside for it."""
        return next((name for name, paths in self.members.items() if str(kind) in paths or kind.level1 in paths), None)

    def as_parameter(self) -> dict[str, Any]:
        """Plain values that `read_quotas` reads back, for keys, for the parameters of a policy and for the lake."""
        return {name: {"share": self.shares[name], "types": list(self.members[name])} for name in self.shares}

    def counts(self, total: int) -> dict[str, int]:
        """`total` rows dealt out by share: whole numbers that sum to it, what is left over going to the largest remainders."""
        exact = {name: share * total for name, share in self.shares.items()}
        dealt = {name: math.floor(rows) for name, rows in exact.items()}
        for name in sorted(exact, key=lambda name: (dealt[name] - exact[name], name))[: total - sum(dealt.values())]:
            dealt[name] += 1
        return dealt


def read_quotas(value: str | Mapping[str, Any]) -> Quotas:
    """Quotas from the name of a packaged mix, from {type: share}, or from {name: {share, types}}. A type is a level1 of the taxonomy
    ('object'), a level1/level2 ('object/add'), or 'unmapped'. Raises QuotaError."""
    taxonomy = load_taxonomy()
    if isinstance(value, str):
        return _of_mix(taxonomy, value)
    if not isinstance(value, Mapping) or not value:
        raise QuotaError(f"quotas are the name of a mix ({', '.join(_mixes(taxonomy))}) or {{type: share}}, not {value!r}")
    shares: dict[str, float] = {}
    members: dict[str, tuple[str, ...]] = {}
    for name, entry in value.items():
        own = isinstance(entry, Mapping)
        share, paths = (entry.get("share"), entry.get("types")) if own else (entry, [name])
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise QuotaError(f"the share of {name!r} is {share!r}: give a number above 0 and up to 1")
        if not isinstance(paths, list | tuple) or not paths:
            raise QuotaError(f"the quota {name!r} must name its types, as in {{share: 0.5, types: [object, camera/zoom]}}")
        shares[str(name)], members[str(name)] = float(share), tuple(_known(taxonomy, path) for path in paths)
    _refuse_overlap(members)
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise QuotaError(f"the shares of {', '.join(shares)} sum to {sum(shares.values()):g}: they must sum to 1")
    return Quotas(shares, members)


def _mixes(taxonomy: Taxonomy) -> list[str]:
    return sorted({mix for mix, _ in taxonomy.shares})


def _of_mix(taxonomy: Taxonomy, name: str) -> Quotas:
    found = {category: entry for (mix, category), entry in taxonomy.shares.items() if mix == name}
    if not found:
        raise QuotaError(f"there is no mix {name!r} in taxonomy.yaml: {_nearest(name, _mixes(taxonomy))}")
    return Quotas({category: share for category, (share, _) in found.items()}, {category: paths for category, (_, paths) in found.items()})


def _known(taxonomy: Taxonomy, path: Any) -> str:
    paths = [*taxonomy.levels, *(f"{level1}/{level2}" for level1, names in taxonomy.levels.items() for level2 in names), UNMAPPED]
    if path not in paths:
        raise QuotaError(f"there is no edit type {path!r} in the taxonomy: {_nearest(str(path), paths)}")
    return str(path)


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1) or [path for path in known if path.rpartition("/")[2] == name][:1]
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"


def _refuse_overlap(members: Mapping[str, tuple[str, ...]]) -> None:
    paths = [path for names in members.values() for path in names]
    for number, path in enumerate(paths):
        other = next((known for place, known in enumerate(paths) if place != number and f"{path}/".startswith(f"{known}/")), None)
        if other is not None:
            what = f"{path!r} is named twice" if other == path else f"{path!r} lies within {other!r}"
            raise QuotaError(f"{what}: each type counts under one share, so name one of them")
