"""The pictures of a user's own sources feed the edit routes where the settings name them, and those of other sources do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamlite_data import executors, refresh
from dreamlite_data.dataset import open_dataset
from dreamlite_data.lake import Lake
from dreamlite_data.settings import RefreshSettings


def _settings(root: Path, **changes: object) -> RefreshSettings:
    sources = [{"name": name, "kind": "folder", "path": root / name} for name in ("mine", "rest")]
    return RefreshSettings(**{
        "scenes": {"t2i_rows": 0, "edit_rows": 0}, "photos": {"enabled": False, "edits_per_image": 2}, "extra_sources": sources,
        "policy": {"allow_unanimous": ["*"]}, **changes,
    })  # fmt: skip


def _pictures(root: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("mine", "rest"):
        (root / name).mkdir()
        for number in range(1):
            cells = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(cells.repeat(8, 0).repeat(8, 1)).save(root / name / f"{number}.png")


def _edited(lake: Lake, settings: RefreshSettings) -> set[str]:
    """The sources whose pictures triplets were made of."""
    refresh.ingest(lake, settings, executors.local())
    for names in (["quality"], ["edit", "caption"], ["verify"]):
        refresh.measure(lake, settings, executors.local(), names)
    return set(lake.query("SELECT DISTINCT p.source FROM triplets t JOIN provenance p ON p.image_id = t.base_image_id")["source"].to_pylist())


def test_own_pictures_feed_the_edit_routes_where_they_are_named(lake: Lake, tmp_path: Path) -> None:
    _pictures(tmp_path)
    assert _edited(lake, _settings(tmp_path)) == set()
    settings = _settings(tmp_path, edit_sources=["mine"], composite={"per_image": 1})
    assert _edited(lake, settings) == {"mine"}
    refresh.curate(lake, settings, 0)
    routes = {row_id: route for row_id, route in zip(*lake.query("SELECT row_id, route FROM triplets").to_pydict().values(), strict=True)}
    assert {routes[row_id] for row_id in open_dataset(lake, "photo_edits").rows["row_id"].to_pylist()} == {"exact", "composite"}


def test_an_unknown_edit_source_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="edit_sources names 'mime', which is neither 'photos' nor one of refresh.extra_sources: did you mean 'mine'"):
        _settings(tmp_path, edit_sources=["photos", "mime"])
    both = [{"name": "photos", "kind": "folder", "path": tmp_path}]
    with pytest.raises(ValueError, match="give the source of refresh.extra_sources another name"):
        _settings(tmp_path, extra_sources=both, edit_sources=["photos"])
    assert _settings(tmp_path, extra_sources=both).edit_sources == ("photos",)
