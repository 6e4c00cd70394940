"""Reward models: a Qwen-VL decoder with a small head read at one token, after HPSv3 and EditReward.
Scores datasets (`score`) and gives gradients to images (`differentiable`); the two share one network."""

from dreamlite_data.rewards.loader import RewardCheckpointError
from dreamlite_data.rewards.model import RewardModel, RewardScores, load_reward
from dreamlite_data.rewards.spec import RewardSpec

__all__ = ["RewardCheckpointError", "RewardModel", "RewardScores", "RewardSpec", "load_reward"]
