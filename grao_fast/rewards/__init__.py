"""Rewards: functions that score completions, and ready-made ones.

Users pass functions to `grao_fast.train`; `grao_fast.rewards.functions` says what a function gets
and returns. `RewardModel` is a sequence classifier that scores, a `Judge` asks a language model;
`ExactMatch`, `Regex`, `Math`, `Length` and `JSONSchema` check a text by a rule. Their objects are
functions too.

Those who score completions themselves import from here: `resolve_reward` finds functions and makes
a `Reward` of them, whose `score_groups` returns `GroupScores`. `RewardError` is raised for a
function that cannot be found or called, that fails, or that returns wrong values. `per_group` marks
functions that score a group while others are sampled.
"""

from grao_fast.rewards.early import per_group
from grao_fast.rewards.finding import RewardError
from grao_fast.rewards.functions import GroupScores, Reward, resolve_reward
from grao_fast.rewards.judge import Judge
from grao_fast.rewards.reward_model import RewardModel
from grao_fast.rewards.rules import ExactMatch, JSONSchema, Length, Math, Regex

__all__ = [
    "ExactMatch",
    "GroupScores",
    "JSONSchema",
    "Judge",
    "Length",
    "Math",
    "Regex",
    "Reward",
    "RewardError",
    "RewardModel",
    "per_group",
    "resolve_reward",
]
