"""Reward models: a Qwen-VL decoder with a small head read at one token, after HPSv3 and EditReward.
Scores datasets (`score`) and gives gradients to images (`differentiable`); the two share one network."""

from dreamlite_data.rewards.model import RewardModel, RewardScores, load_reward
from dreamlite_data.rewards.spec import RewardSpec
from dreamlite_data.rewards.stored import RewardCheckpointError

__all__ = ["RewardCheckpointError", "RewardModel", "RewardScores", "RewardSpec", "load_reward"]
