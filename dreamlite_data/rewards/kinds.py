"""Every kind of scorer by its name: what loads it, and what packs rows for it.
All of them answer `score`, `score_packed`, `differentiable`, `scorer_id` and `head_names` alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dreamlite_data.rewards.aesthetic import Aesthetic, aesthetic_packer, load_aesthetic
from dreamlite_data.rewards.image_reward import ImageReward, image_reward_packer, load_image_reward
from dreamlite_data.rewards.model import RewardModel, load_reward
from dreamlite_data.rewards.packing import RowPacker, load_packer
from dreamlite_data.rewards.square_scorer import SquarePacker, SquareScorer
from dreamlite_data.rewards.towers import ClipScore, HpsV2, PickScore, clip_packer, load_clip_folder, load_open_clip

REWARD = "reward"
"""A reward model of the classes of HPSv3 and EditReward; its folder says which."""
FURTHER: dict[str, tuple[type[SquareScorer], Callable[[Path, torch.dtype], nn.Module], Callable[[Path], SquarePacker]]] = {
    scorer.kind: (scorer, load, pack)
    for scorer, load, pack in (
        (ClipScore, load_clip_folder, functools.partial(clip_packer, kind=ClipScore.kind)),
        (PickScore, load_clip_folder, functools.partial(clip_packer, kind=PickScore.kind)),
        (HpsV2, load_open_clip, functools.partial(clip_packer, kind=HpsV2.kind)),
        (ImageReward, load_image_reward, image_reward_packer),
        (Aesthetic, load_aesthetic, aesthetic_packer),
    )
}
"""Every further scorer by its kind: its class, what reads its network from a folder, and what packs rows for it."""
KINDS = (REWARD, *FURTHER)

Scorer = RewardModel | SquareScorer


def load_scorer(kind: str, folder: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Scorer:
    """The scorer in `folder`, frozen; `dtype` is the backbone's, heads stay float32. Raises RewardCheckpointError where the
    folder does not hold it, ValueError for an unknown kind."""
    folder = Path(folder)
    if kind == REWARD:
        return load_reward(folder, device, dtype)
    packer = load_scorer_packer(kind, folder)
    scorer, load, _ = FURTHER[kind]
    return scorer(folder, packer, load(folder, dtype).to(device), dtype)


def load_scorer_packer(kind: str, folder: Path | str) -> RowPacker | SquarePacker:
    """What packs rows for the scorer in `folder`; loads no weight. Raises as `load_scorer` does."""
    folder = Path(folder)
    if kind not in KINDS:
        raise ValueError(f"there is no scorer of kind {kind!r}: the kinds are {', '.join(KINDS)}")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} for the scorer {kind!r}: put the model there or correct the setting")
    return load_packer(folder) if kind == REWARD else FURTHER[kind][2](folder)
