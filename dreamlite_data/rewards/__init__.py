"""Reward models: a Qwen-VL decoder with a small head read at one token, after HPSv3 and EditReward, and further scorers beside them.
All score datasets (`score`) and give gradients to images (`differentiable`)."""

from dreamlite_data.rewards.kinds import KINDS, Scorer, load_scorer, load_scorer_packer
from dreamlite_data.rewards.model import RewardModel, load_reward
from dreamlite_data.rewards.scores import RewardScores
from dreamlite_data.rewards.spec import RewardSpec
from dreamlite_data.rewards.stored import RewardCheckpointError

__all__ = [
    "KINDS", "RewardCheckpointError", "RewardModel", "RewardScores", "RewardSpec", "Scorer", "load_reward", "load_scorer",
    "load_scorer_packer",
]  # fmt: skip
