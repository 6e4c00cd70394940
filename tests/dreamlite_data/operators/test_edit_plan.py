"""Draws aim at the quotas: types that are short get more of them, what nobody makes is said, and no order of pictures matters."""

from __future__ import annotations

from collections import Counter

import pytest

from dreamlite_data.operators import composite, exact
from dreamlite_data.operators.edit_plan import EditPlan, composite_offers, exact_offers
from dreamlite_data.settings import RefreshSettings
from dreamlite_data.taxonomy import EditType, load_taxonomy

PICTURES = [f"{number:064x}" for number in range(400)]
BOTH = {"photos": {"edits_per_image": 2}, "composite": {"per_image": 2, "inverse": False}}


def _plan(shares: dict[str, float] | None = None, **changes: object) -> EditPlan:
    return EditPlan.of(RefreshSettings(**{**BOTH, **changes}, quotas={"steer": True, **({"shares": shares} if shares else {})}))


def _drawn(rows: list[dict]) -> Counter[str]:
    return Counter(kind for row in rows for route in EditPlan.routes for kind in row[route])


def _share(counts: Counter[str], *level1: str) -> float:
    return sum(number for kind, number in counts.items() if kind.split("/")[0] in level1) / counts.total()


def test_the_draws_keep_the_proportions_of_the_quotas_that_can_be_made() -> None:
    plan = _plan()
    assert plan.cannot() == ["understanding", "style"]
    counts = _drawn(plan(PICTURES, {}))
    assert counts.total() == 4 * len(PICTURES)  # as many as without quotas
    makeable = 830 + 300 + 151
    for category, rows in ((("object", "attribute"), 830), (("scene", "low_level"), 300), (("camera",), 151)):
        assert _share(counts, *category) == pytest.approx(rows / makeable, abs=0.002)


def test_what_is_short_is_drawn_until_it_is_not() -> None:
    plan = _plan({"object": 0.5, "camera": 0.5})
    held = {EditType("object", "add"): 600.0}
    counts = _drawn(plan(PICTURES, held))
    assert abs((600 + counts.total() * _share(counts, "object")) - counts.total() * _share(counts, "camera")) <= 2
    even = _drawn(plan(PICTURES, {}))
    assert _share(even, "camera") == pytest.approx(0.5, abs=0.01) and _share(counts, "camera") > 0.6
    within = _drawn(plan(PICTURES, {EditType("object", "add"): 100.0}))
    assert within["object/add"] == min(number for kind, number in within.items() if kind.startswith("object/"))


def test_ways_back_count_as_what_they_are() -> None:
    plan = _plan({"object/add": 0.5, "object/remove": 0.5}, composite={"per_image": 2, "inverse": True})
    rows = plan(PICTURES, {EditType("object", "remove"): 1.0})
    counts = _drawn(rows)
    assert set(counts) == {"object/add", "object/remove"} and abs(counts["object/add"] - counts["object/remove"]) <= 1
    assert counts.total() == 2 * len(PICTURES)  # each operation on cut-outs once, whatever the number asked for
    assert plan.cannot() == [] and _plan({"object/add": 0.5, "style": 0.5}).cannot() == ["style"]


def test_no_order_of_pictures_matters_and_a_type_without_a_share_is_never_drawn() -> None:
    plan = _plan({"camera/zoom": 0.2, "low_level": 0.8})
    rows = plan(PICTURES, {})
    assert plan(PICTURES[::-1], {}) == rows and [row["subject_id"] for row in rows] == PICTURES
    assert all(kind.startswith(("camera/zoom", "low_level/")) for kind in _drawn(rows)) and not any(row["composite"] for row in rows)
    for row in rows:  # zoom is one operation: no picture is asked for it twice
        assert row["exact"].count("camera/zoom") <= 1


def test_the_model_route_makes_at_most_its_own_number(tmp_path) -> None:
    models = {"editor": tmp_path, "instructor": tmp_path, "tries": 1, "per_image": 1}
    plan = _plan({"style": 0.9, "object": 0.1}, edit_model=models)
    rows = plan(PICTURES, {})
    assert plan.cannot() == [] and {len(row["model"]) for row in rows} == {1}
    assert _plan({"style": 1.0}, edit_model={**models, "per_image": 3}).draws.per_image == 7


def test_offers_name_every_operation_once() -> None:
    taxonomy = load_taxonomy()
    for route, offers, count in (("exact", exact_offers(True), len(exact.OPERATIONS)), ("composite", composite_offers(True), len(composite.OPERATIONS))):
        assert sum(offer.most for offer in offers) == count and {offer.route for offer in offers} == {route}
        assert all(offer.kind in taxonomy for offer in offers)
    back = {offer.kind: offer.brings for offer in composite_offers(True)}
    assert back[EditType("object", "add")] == ((EditType("object", "remove"), 1.0),)
    assert all(offer.brings == () for offer in exact_offers(False))
