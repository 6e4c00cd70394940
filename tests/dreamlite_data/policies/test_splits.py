"""Splits hang on the names of groups, train and heldout or named, with every turn of a session in one."""

from __future__ import annotations

import hashlib

import pyarrow as pa
import pytest

from dreamlite_data.dataset import DatasetError, open_dataset
from dreamlite_data.lake import Lake
from dreamlite_data.policies.curate import freeze, judge
from dreamlite_data.policies.policy import read_policy
from dreamlite_data.policies.splits import split_order, split_shares, with_split
from dreamlite_data.policies.versions import list_versions
from dreamlite_data.publishing.rows import cut_shards
from dreamlite_data.settings import PolicySettings

NAMED = {"train": 0.8, "validation": 0.15, "test": 0.05}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """An empty lake for tests that write nothing."""
    return Lake(tmp_path_factory.mktemp("bare"))


def _draw(group: str) -> float:
    return int.from_bytes(hashlib.sha256(f"split:{group}".encode()).digest()[:8], "big") / 2**64


def _split_of(group: str, heldout_share: float) -> str:
    """The rule for one group, stated apart from the SQL that applies it to a column."""
    return "heldout" if _draw(group) < heldout_share else "train"


def _splits(lake: Lake, groups: list[str | None], **parameters: object) -> list[str]:
    kept = pa.table({"group_id": pa.array(groups, pa.string()), "row_id": [f"r{number}" for number in range(len(groups))]})
    return with_split(lake, kept, parameters)["split"].to_pylist()


def test_the_split_of_a_column_is_the_split_of_each_group(bare: Lake) -> None:
    groups = [f"g{number}" for number in range(500)] + [None, ""]
    for share in (0.0, 0.05, 0.5):
        names = [group or f"r{number}" for number, group in enumerate(groups)]
        assert _splits(bare, groups, heldout_share=share, splits={}) == [_split_of(name, share) for name in names]


def test_a_share_of_groups_is_held_out_and_always_the_same(bare: Lake) -> None:
    names: list[str | None] = [f"group{n}" for n in range(4000)]
    first = _splits(bare, names, heldout_share=0.05)
    assert first == _splits(bare, names, heldout_share=0.05)
    assert 0.035 < first.count("heldout") / len(names) < 0.065
    wider = _splits(bare, names, heldout_share=0.10)
    assert all(after == "heldout" for before, after in zip(first, wider, strict=True) if before == "heldout")
    assert set(_splits(bare, names, heldout_share=0.0)) == {"train"}


def test_named_splits_have_their_shares_and_new_rows_move_none(bare: Lake) -> None:
    names: list[str | None] = [f"group{n}" for n in range(4000)]
    first = _splits(bare, names, splits=NAMED)
    for name, share in NAMED.items():
        assert abs(first.count(name) / len(names) - share) < 0.02
    assert first == ["validation" if (d := _draw(str(name))) < 0.15 else "test" if d < 0.2 else "train" for name in names]
    assert _splits(bare, ["newcomer", *names], splits=NAMED)[1:] == first
    # Named like the default they are the default: an edit-free lake changes nothing when it spells its splits out.
    assert _splits(bare, names, splits={"train": 0.95, "heldout": 0.05}) == _splits(bare, names, heldout_share=0.05)


def _lake_with_a_session(lake: Lake, turns: int, inverse: bool = False) -> None:
    """Pictures p0 -> p1 -> ... by a provider, of which p1 has a near-duplicate twin, and the ways back."""
    steps = [(f"p{n}", f"p{n + 1}", "") for n in range(turns)] + [(f"p{n + 1}", f"p{n}", "inverse") for n in range(turns) if inverse]
    lake.append({
        "edits": [{"edit_id": f"{source}-{target}", "source_image_id": source, "target_image_id": target, "route": "provider", "relation": relation}
                  for source, target, relation in steps],
        "op_duplicates": [{"subject_id": name, "op_version": "d", "group_id": group} for name, group in
                          [(f"p{n}", f"p{n}") for n in range(turns + 1)] + [("twin", "p1")]],
        "operator_versions": [{"name": "duplicates", "op_version": "d", "config_json": "{}", "position": 0}],
    })  # fmt: skip


def test_all_turns_of_a_session_share_the_split_of_its_first_picture(lake: Lake) -> None:
    _lake_with_a_session(lake, 12, inverse=True)
    groups: list[str | None] = [f"p{n}" for n in range(12)]
    assert {_split_of(f"p{n}", 0.5) for n in range(12)} == {"train", "heldout"}  # what each turn would draw by itself
    assert set(_splits(lake, groups, heldout_share=0.5, splits={})) == {_split_of("p0", 0.5)}
    together = _splits(lake, groups, splits={"train": 0.5, "test": 0.5})
    assert set(together) == {"test" if _draw("p0") < 0.5 else "train"}
    lake.append({"edits": [  # what our routes make and later targets of the same picture rename nothing, nor does a way back
        {"edit_id": "made", "source_image_id": "a-made", "target_image_id": "p0", "route": "composite", "relation": ""},
        {"edit_id": "later", "source_image_id": "p0", "target_image_id": "a-later", "route": "provider", "relation": ""},
    ]})  # fmt: skip
    assert _splits(lake, groups, splits={"train": 0.5, "test": 0.5}) == together
    assert _splits(lake, ["a-later", "stranger"], splits={"train": 0.5, "test": 0.5})[0] == together[0]


def test_edits_that_go_round_in_a_circle_share_a_split(lake: Lake) -> None:
    lake.append({"edits": [
        {"edit_id": f"{a}{b}", "source_image_id": a, "target_image_id": b, "route": "provider", "relation": ""} for a, b in ("xy", "yz", "zx")
    ]})  # fmt: skip
    assert len(set(_splits(lake, ["x", "y", "z"], splits={"train": 0.5, "test": 0.5}))) == 1


@pytest.mark.parametrize(("splits", "said"), [
    ({"train": 0.9, "test": 0.2}, "must be shares above 0 that sum to 1; they sum to 1.1"),
    ({"train": 1.5, "test": -0.5}, "must be shares above 0"),
    ({"trian": 0.9, "test": 0.1}, "needs 'train'.*did you mean 'train' by 'trian'"),
    ({"train": 1.0}, "and another to judge them on"),
    ({"train": 0.9, "Test set": 0.1}, "a split cannot be called 'Test set'"),
])  # fmt: skip
def test_splits_that_cannot_be_meant_are_refused(splits: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PolicySettings(splits=splits)


def test_splits_stand_beside_no_heldout_share_and_survive_being_stored() -> None:
    with pytest.raises(ValueError, match="leave heldout_share out"):
        PolicySettings(splits=NAMED, heldout_share=0.1)
    settings = PolicySettings(splits=NAMED)
    assert PolicySettings.model_validate(settings.model_dump(mode="json")) == settings
    assert settings.split_names() == ("train", "validation", "test") and PolicySettings().split_names() == ("train", "heldout")
    assert split_shares(PolicySettings().model_dump()) == {"train": 0.95, "heldout": 0.05}


def test_a_version_knows_its_splits(lake: Lake) -> None:
    policy = read_policy("trial", "-- @candidates\nSELECT 'r' || n AS row_id, 'generate' AS task, 'i' || n AS image_id, CAST(NULL AS VARCHAR) "
                         "AS source_image_id, 't' AS text, CAST(NULL AS VARCHAR) AS edit_type, CAST(NULL AS FLOAT) AS edited_fraction, "
                         "CAST(NULL AS BLOB) AS edit_mask, CAST(1 AS FLOAT) AS weight, 'i' || n AS group_id FROM range(200) t(n)\n-- @rule all\ntrue")  # fmt: skip
    parameters = PolicySettings(splits=NAMED).model_dump()
    freeze(lake, policy, judge(lake, policy, parameters)[0], parameters, [])
    opened = open_dataset(lake, "trial")
    counts = {name: len(opened.split(name)) for name in NAMED}
    assert sum(counts.values()) == 200
    assert list_versions(lake)[0]["splits"] == ", ".join(f"{name} {counts[name]}" for name in NAMED)
    with pytest.raises(DatasetError, match=rf"no rows in split 'heldout'; its splits are test \({counts['test']}\), train"):
        opened.split("heldout")
    assert [shard.split for shard in cut_shards(opened.rows.append_column("size_bytes", pa.array([1] * 200)), 10**6)] == list(NAMED)
    assert sorted(["zebra", "test", "heldout", "train", "validation"], key=split_order) == ["train", "validation", "test", "heldout", "zebra"]
