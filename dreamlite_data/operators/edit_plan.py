"""Which types of edit are drawn from which picture, so that the mix of what the lake holds moves towards its quotas.
The plan is made of counts and of hashes of ids alone, on the driver, before any picture is opened; routes then follow it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dreamlite_data import schema
from dreamlite_data.operators import composite, exact
from dreamlite_data.operators.draw import draw_bits
from dreamlite_data.quotas import Quotas
from dreamlite_data.settings import RefreshSettings
from dreamlite_data.taxonomy import EditType, load_taxonomy

UNSAID = frozenset({"visual_prompt", "composite"})
"""Level1 types that no single instruction about one picture can ask for: they need a drawn prompt, or several turns."""


@dataclasses.dataclass(frozen=True)
class Offer:
    """A route makes up to `most` triplets of `kind` from one picture. `brings` says what else comes with each on average: the
    ways back, (type, how many)."""

    route: str
    kind: EditType
    most: int
    brings: tuple[tuple[EditType, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Draws:
    """What the active routes can do: `offers`, `per_image` triplets from each picture by all of them together, and of these at
    most `limits` by a route."""

    offers: tuple[Offer, ...]
    per_image: int
    limits: Mapping[str, int]


class EditPlan:
    """One row per picture: the types that each route shall make of it."""

    name = "edit_plan"
    version = 1
    table = "op_edit_plan"
    schema = schema.OPERATORS["op_edit_plan"]
    routes = ("exact", "composite", "model")

    def __init__(self, quotas: Quotas, draws: Draws) -> None:
        self.quotas, self.draws = quotas, draws

    @classmethod
    def of(cls, settings: RefreshSettings) -> EditPlan:
        """The plan that these settings ask for."""
        return cls(settings.quotas.read(), draws_of(settings))

    def config(self) -> dict[str, Any]:
        offers = [[offer.route, str(offer.kind), offer.most, [[str(kind), rate] for kind, rate in offer.brings]] for offer in self.draws.offers]
        return {
            "quotas": self.quotas.as_parameter(), "offers": offers, "per_image": self.draws.per_image, "limits": dict(self.draws.limits),
            "taxonomy": load_taxonomy().digest,
        }  # fmt: skip

    def cannot(self) -> list[str]:
        """The quotas that no active route makes: their share stays open, and the others are drawn in proportion."""
        made = {self.quotas.name_of(kind) for offer in self.draws.offers for kind in (offer.kind, *(kind for kind, _ in offer.brings))}
        return [name for name in self.quotas.shares if name not in made]

    def __call__(self, image_ids: Iterable[str], held: Mapping[EditType, float]) -> list[dict[str, Any]]:
        """Rows of `op_edit_plan`, sorted by subject, for pictures without one. `held` counts the triplets of each type that
        the lake has or has planned already. Pictures are taken in the order of a hash of their ids."""
        balance = _Balance(self.quotas, held)
        rows = []
        for image_id in sorted(image_ids, key=lambda image_id: (draw_bits("edit plan", image_id), image_id)):
            drawn = self._draw(image_id, balance)
            rows.append({
                "subject_id": image_id, **{route: [str(offer.kind) for offer in drawn if offer.route == route] for route in self.routes}
            })  # fmt: skip
        return sorted(rows, key=lambda row: row["subject_id"])

    def _draw(self, image_id: str, balance: _Balance) -> list[Offer]:
        drawn: list[Offer] = []
        taken: Counter[Offer] = Counter()
        by_route: Counter[str] = Counter()
        for _ in range(self.draws.per_image):
            open_ = [
                offer for offer in self.draws.offers
                if taken[offer] < offer.most and by_route[offer.route] < self.draws.limits.get(offer.route, self.draws.per_image)
            ]  # fmt: skip
            chosen = balance.choose(open_, image_id)
            if chosen is None:
                break
            drawn.append(chosen)
            taken[chosen] += 1
            by_route[chosen.route] += 1
            balance.add(chosen)
        return drawn


class _Balance:
    """Triplets held so far by quota, by type and by offer."""

    def __init__(self, quotas: Quotas, held: Mapping[EditType, float]) -> None:
        self.quotas = quotas
        self.names: dict[EditType, str | None] = {}
        self.by_name: dict[str, float] = dict.fromkeys(quotas.shares, 0.0)
        self.by_kind: dict[EditType, float] = {}
        self.by_offer: Counter[Offer] = Counter()
        for kind in sorted(held):
            self._count(kind, held[kind])

    def choose(self, offers: Sequence[Offer], image_id: str) -> Offer | None:
        """The offer of the quota that is shortest. (held + 1/2) / share is Sainte-Lague's quotient: the least one gets the next,
        so types that can be drawn keep the proportion of their shares even where others can not."""
        names = {name for offer in offers if (name := self._name(offer.kind)) is not None}
        if not names:
            return None
        shortest = min(names, key=lambda name: ((self.by_name[name] + 0.5) / self.quotas.shares[name], name))
        return min(
            (offer for offer in offers if self._name(offer.kind) == shortest),
            key=lambda offer: (
                self.by_kind.get(offer.kind, 0.0), self.by_offer[offer], draw_bits("quota", image_id, offer.route, offer.kind), offer.route,
                offer.kind,
            ),  # fmt: skip
        )

    def add(self, offer: Offer) -> None:
        """Count what a drawn offer will bring."""
        self.by_offer[offer] += 1
        self._count(offer.kind, 1.0)
        for kind, rate in offer.brings:
            self._count(kind, rate)

    def _name(self, kind: EditType) -> str | None:
        if kind not in self.names:
            self.names[kind] = self.quotas.name_of(kind)
        return self.names[kind]

    def _count(self, kind: EditType, number: float) -> None:
        self.by_kind[kind] = self.by_kind.get(kind, 0.0) + number
        name = self._name(kind)
        if name is not None:
            self.by_name[name] += number


# --- what routes can do ----------------------------------------------------------------------------------------------


def draws_of(settings: RefreshSettings) -> Draws:
    """What the routes that the settings switch on can make. Together they make as many triplets of a picture as without quotas;
    the model route, the dear one, makes at most its own number of them."""
    offers: list[Offer] = []
    per_image, limits = 0, {}
    if settings.photos.edits_per_image:
        per_image += settings.photos.edits_per_image
        offers += exact_offers(settings.photos.inverse_edits)
    if settings.composite.per_image:
        per_image += settings.composite.per_image
        offers += composite_offers(settings.composite.inverse)
    if settings.edit_model.editor is not None:
        per_image += settings.edit_model.per_image
        limits["model"] = settings.edit_model.per_image
        offers += model_offers(settings.edit_model.per_image)
    return Draws(tuple(sorted(offers, key=lambda offer: (offer.route, offer.kind))), per_image, limits)


def exact_offers(inverse: bool) -> list[Offer]:
    """A picture draws each exact operation once at most, so a type as often as it has operations."""
    return _by_kind("exact", [
        (operation.words.edit_type, operation.inverse.edit_type if inverse and operation.inverse is not None else None)
        for operation in exact.OPERATIONS.values()
    ])  # fmt: skip


def composite_offers(inverse: bool) -> list[Offer]:
    """Each operation on cut-outs once."""
    back = {"add": "remove", "remove": "add"}
    return _by_kind("composite", [(name, back.get(name, name) if inverse else None) for name in composite.OPERATIONS])


def model_offers(per_image: int) -> list[Offer]:
    """Whatever can be asked for in a sentence."""
    levels = load_taxonomy().levels
    return [
        Offer("model", EditType(level1, level2), per_image) for level1, names in levels.items() if level1 not in UNSAID for level2 in names
    ]


def _by_kind(route: str, operations: Sequence[tuple[str, str | None]]) -> list[Offer]:
    """Offers of a route whose operations are (label, label of the way back or None)."""
    taxonomy = load_taxonomy()
    kinds: dict[EditType, list[EditType | None]] = {}
    for label, back in operations:
        kinds.setdefault(taxonomy.edit_type(label, route), []).append(taxonomy.edit_type(back, route) if back is not None else None)
    return [
        Offer(route, kind, len(ways), tuple((way, count / len(ways)) for way, count in sorted(Counter(w for w in ways if w).items())))
        for kind, ways in kinds.items()
    ]
