"""Rewards: Python functions, found, called, checked and summed."""

from grao_fast.rewards.functions import GroupScores, Reward, RewardError, resolve_reward

__all__ = ["GroupScores", "Reward", "RewardError", "resolve_reward"]
