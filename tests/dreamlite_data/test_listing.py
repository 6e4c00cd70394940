"""Units that wait on disk are compared with the lake as if they were held in memory."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dreamlite_data import listing
from dreamlite_data.lake import Lake
from dreamlite_data.listing import Listing
from dreamlite_data.refresh import _ingest_tasks
from dreamlite_data.settings import RefreshSettings
from dreamlite_data.sources.base import Unit


def _unit(number: int, **changes: object) -> Unit:
    plain = Unit("own", "other", f"{number}.jpg", f"/own/{number}.jpg", f"digest {number}", "file", 10, sidecars=(f"{number}.txt",))
    return dataclasses.replace(plain, **changes)


def _read(lake: Lake, unit: Unit, version: str = "v", error: str | None = None) -> None:
    row = {"subject_id": f"{unit.source}/{unit.shard}", "source": unit.source, "shard": unit.shard, "digest": unit.digest}
    lake.append({"op_shard": [{**row, "op_version": version, "rows": 1, "failed": 0, "error": error}]})


@pytest.mark.parametrize("at_once", [3, 2048])
def test_what_is_new_changed_failed_or_gone_is_found(lake: Lake, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(listing, "UNITS_AT_ONCE", at_once)
    units = [_unit(number) for number in range(10)]
    remote = [_unit(10, path="https://host/10.jpg"), _unit(11, path="https://host/11.jpg")]
    for unit in (units[0], dataclasses.replace(units[4], digest="before"), remote[0], _unit(99), _unit(98, source="switched off")):
        _read(lake, unit)
    _read(lake, units[5], version="older")
    _read(lake, units[6], error="a broken shard stays in quarantine")
    _read(lake, remote[1], error="a host that was down")
    with Listing(lake, iter([*units, *remote])) as found:
        assert found.count == 12
        assert found.gone(["own"]) == [("own", "99.jpg")]
        positions, replaces = found.pending("v")
        assert dict(zip(positions.tolist(), replaces.tolist(), strict=True)) == {
            1: False, 2: False, 3: False, 4: True, 5: True, 7: False, 8: False, 9: False, 11: True
        }  # fmt: skip
        assert list(found.at(positions)) == [*units[1:6], *units[7:], remote[1]]
        assert list(found.at(np.array([0, 11]))) == [units[0], remote[1]]  # and again, from the start
    assert not list(lake.staging.iterdir())


def test_files_make_one_task_until_they_are_many_or_large_and_shards_one_each() -> None:
    settings = RefreshSettings(ingest={"folder_files_per_task": 3, "folder_mb_per_task": 1})
    mb = 2**20
    small = [_unit(number) for number in range(4)]
    large = [_unit(4, size_bytes=mb), _unit(5, size_bytes=mb // 2), _unit(6, size_bytes=mb // 2), _unit(7, size_bytes=1)]
    shard, other = _unit(8, kind="tar"), _unit(9, source="other")
    given = [(unit, unit.shard in ("1.jpg", "8.jpg")) for unit in (*small, *large, shard, other)]
    tasks = list(_ingest_tasks(iter(given), settings, "v", "staging"))
    assert [[unit.shard[0] for unit in task.units] for task in tasks] == [["0", "1", "2"], ["3"], ["4"], ["5", "6"], ["7"], ["8"], ["9"]]
    assert [task.replaces for task in tasks if task.replaces] == [(("own", "1.jpg"),), (("own", "8.jpg"),)]
