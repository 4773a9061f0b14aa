"""Rewards: Python functions that score completions.

Users pass functions to `grao_fast.train`; `grao_fast.rewards.functions` says what a function gets
and returns. Those who score completions themselves import from here: `resolve_reward` finds
functions and makes a `Reward` of them, whose `score_groups` returns `GroupScores`. `RewardError` is
raised for a function that cannot be found or called, that fails, or that returns wrong values.
"""

from grao_fast.rewards.finding import RewardError
from grao_fast.rewards.functions import GroupScores, Reward, resolve_reward

__all__ = ["GroupScores", "Reward", "RewardError", "resolve_reward"]
