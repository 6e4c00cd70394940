"""Every kind of scorer by its name: what loads it, and what packs rows for it.
All of them answer `score`, `score_packed`, `differentiable`, `scorer_id` and `head_names` alike."""

from __future__ import annotations

from pathlib import Path

import torch

from dreamlite_data.rewards.aesthetic import Aesthetic, aesthetic_packer, load_aesthetic
from dreamlite_data.rewards.image_reward import ImageReward, image_reward_packer, load_image_reward
from dreamlite_data.rewards.model import RewardModel, load_reward
from dreamlite_data.rewards.packing import RowPacker, load_packer
from dreamlite_data.rewards.square_scorer import SquarePacker, SquareScorer
from dreamlite_data.rewards.towers import ClipScore, HpsV2, PickScore, clip_packer, load_clip_folder, load_open_clip

REWARD = "reward"
"""A reward model of the classes of HPSv3 and EditReward; its folder says which."""
KINDS = (REWARD, ClipScore.kind, PickScore.kind, HpsV2.kind, ImageReward.kind, Aesthetic.kind)

Scorer = RewardModel | SquareScorer


def load_scorer(kind: str, folder: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Scorer:
    """The scorer in `folder`, frozen; `dtype` is the backbone's, heads stay float32. Raises RewardCheckpointError where the
    folder does not hold it, ValueError for an unknown kind."""
    folder = Path(folder)
    if kind == REWARD:
        return load_reward(folder, device, dtype)
    packer = load_scorer_packer(kind, folder)
    if kind == HpsV2.kind:
        return HpsV2(folder, packer, load_open_clip(folder, dtype).to(device), dtype)
    if kind == ImageReward.kind:
        return ImageReward(folder, packer, load_image_reward(folder, dtype).to(device), dtype)
    if kind == Aesthetic.kind:
        return Aesthetic(folder, packer, load_aesthetic(folder, dtype).to(device), dtype)
    scorer = ClipScore if kind == ClipScore.kind else PickScore
    return scorer(folder, packer, load_clip_folder(folder, dtype).to(device), dtype)


def load_scorer_packer(kind: str, folder: Path | str) -> RowPacker | SquarePacker:
    """What packs rows for the scorer in `folder`; loads no weight. Raises as `load_scorer` does."""
    folder = Path(folder)
    if kind not in KINDS:
        raise ValueError(f"there is no scorer of kind {kind!r}: the kinds are {', '.join(KINDS)}")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} for the scorer {kind!r}: put the model there or correct the setting")
    if kind == REWARD:
        return load_packer(folder)
    if kind == ImageReward.kind:
        return image_reward_packer(folder)
    return aesthetic_packer(folder) if kind == Aesthetic.kind else clip_packer(folder, kind)
