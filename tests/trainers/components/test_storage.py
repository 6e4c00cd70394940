"""Parts are stored in half the bytes and come back in single precision, equal to what was stored."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file

from trainers.components.build import FOLDERS, PACKAGED, build_components
from trainers.components.storage import store_half, unpack
from trainers.settings import ComponentsSettings


def test_half_and_back_loses_the_rounding_alone(tmp_path) -> None:
    weights = {"matrix": torch.randn(64, 64), "count": torch.tensor([3]), "half": torch.ones(2, dtype=torch.float16)}
    (tmp_path / "part" / "inner").mkdir(parents=True)
    path = tmp_path / "part" / "inner" / "model.safetensors"
    save_file(weights, path, {"format": "pt"})
    before = path.stat().st_size
    store_half(tmp_path / "part")
    stored = load_file(path)
    assert path.stat().st_size < 0.6 * before and stored["matrix"].dtype == torch.float16 and stored["count"].dtype == torch.int64
    assert torch.equal(stored["matrix"], weights["matrix"].half())
    back = load_file(unpack(tmp_path / "part", tmp_path / "run") / "inner" / "model.safetensors")
    assert back["matrix"].dtype == torch.float32 and torch.equal(back["matrix"], stored["matrix"].float())
    assert not torch.equal(back["matrix"], weights["matrix"])  # the rounding is real
    assert sorted(each.name for each in (tmp_path / "part" / "inner").iterdir()) == ["model.safetensors"]


def test_the_packaged_parts_weigh_at_most_ten_megabytes() -> None:
    assert sum(path.stat().st_size for path in PACKAGED.rglob("*") if path.is_file()) <= 10_000_000


def test_a_run_gets_what_it_needs_in_single_precision_and_no_captioner(tmp_path) -> None:
    folder = build_components(ComponentsSettings(), tmp_path)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir()) == sorted([*FOLDERS, "rewards"])
    dtypes = {value.dtype for path in folder.rglob("*.safetensors") for value in load_file(path).values()}
    assert dtypes == {torch.float32}
