"""Quotas are read from a mix or from shares, and what cannot be meant is refused with what was probably meant."""

from __future__ import annotations

import pytest

from dreamlite_data.quotas import QuotaError, read_quotas
from dreamlite_data.taxonomy import UNMAPPED, EditType


def test_a_mix_and_its_own_parameter_say_the_same() -> None:
    quotas = read_quotas("dreamlite")
    assert sum(quotas.shares.values()) == pytest.approx(1) and quotas.name_of(EditType("object", "add")) == "local"
    assert read_quotas(quotas.as_parameter()) == quotas
    assert quotas.name_of(EditType(UNMAPPED, UNMAPPED)) is None


def test_shares_of_ones_own_name_level1_or_level2_and_the_rest_has_none() -> None:
    quotas = read_quotas({"object/add": 0.5, "scene": 0.25, "unmapped": 0.25})
    names = [quotas.name_of(EditType(*pair)) for pair in (("object", "add"), ("object", "remove"), ("scene", "tone"), ("unmapped", "unmapped"))]
    assert names == ["object/add", None, "scene", "unmapped"]


@pytest.mark.parametrize(("value", "said"), [
    ({"object": 0.5, "camera": 0.4}, "shares of object, camera sum to 0.9: they must sum to 1"),
    ({"objekt": 1.0}, "no edit type 'objekt' in the taxonomy: did you mean 'object'"),
    ({"add": 1.0}, "no edit type 'add' in the taxonomy: did you mean '(object|text)/add'"),
    ({"object": 0.5, "object/add": 0.5}, "'object/add' lies within 'object'"),
    ({"a": {"share": 0.5, "types": ["style"]}, "style": 0.5}, "'style' is named twice"),
    ({"object": "half"}, "share of 'object' is 'half'"),
    ({"object": -1.0}, "share of 'object' is -1.0"),
    ({"a": {"share": 1.0}}, "must name its types"),
    ("dreamlight", "no mix 'dreamlight' in taxonomy.yaml: did you mean 'dreamlite'"),
    (7, "quotas are the name of a mix"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(value: object, said: str) -> None:
    with pytest.raises(QuotaError, match=said):
        read_quotas(value)


@pytest.mark.parametrize("total", [0, 1, 7, 100, 1741])
def test_rows_are_dealt_out_whole_and_none_is_lost(total: int) -> None:
    quotas = read_quotas("dreamlite")
    counts = quotas.counts(total)
    assert sum(counts.values()) == total
    assert all(abs(counts[name] - share * total) < 1 for name, share in quotas.shares.items())
