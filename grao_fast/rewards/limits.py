"""Time limits: one for all functions of a reward, or one for each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from grao_fast.rewards.finding import RewardError

# Seconds, for all functions or for each; None: no limit.
Timeout = float | Sequence[float | None] | None


def limit_of_each(timeout: Timeout, count: int) -> list[float | None]:
    """The limits of so many functions. Raises RewardError for another number of limits."""
    if not isinstance(timeout, Sequence):
        return [timeout] * count
    if len(timeout) != count:
        raise RewardError(
            f"reward_timeout must be one number, or hold {count}, one for each reward function "
            f"(None: no limit); got {list(timeout)}"
        )
    return list(timeout)


def longest(timeout: Timeout) -> float | None:
    """The longest of several time limits; None if one of them is none."""
    if not isinstance(timeout, Sequence):
        return timeout
    limits = [math.inf if each is None else each for each in timeout]
    return None if math.inf in limits else max(limits, default=None)
