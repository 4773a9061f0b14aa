"""Advantage-weighted regression: SFT on the samples, each weighted by its advantage.

    loss = -(sum_s w_s sum_t log pi(s_t)) / (sum_s |s|)
    w_s  = min(exp(A_s / temperature), cap),    A_s = r_s - mean of its group

The sums are over all scored samples of the step, so that a token is what the paper calls a state
and an action. Where the paper learns a value function, the baseline is the mean reward of the
group. A group whose rewards are all equal has w = 1: it is regressed on, as the formula says.

Source: arXiv 1910.00177, Algorithm 1; the cap of 20 is the authors'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from grao_fast.objectives.base import Groups, Objective
from grao_fast.objectives.options import check_number
from grao_fast.objectives.statistics import (
    centred,
    mean_over_sample_tokens,
    of_samples,
    sample_rewards,
)


@dataclass(frozen=True)
class AWR(Objective):
    """SFT on samples, weighted by exp(A / temperature).

    temperature: in units of the reward; the lower, the more the best samples count.
    cap: the largest weight of a sample.
    """

    temperature: float = 1.0
    cap: float = 20.0

    uses_references: ClassVar[bool] = False
    has_dead_groups: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "temperature", above=0)
        check_number(self, "cap", above=0)

    def advantages(self, rewards_NK: Tensor) -> Tensor:
        advantages_NG = centred(sample_rewards(rewards_NK))
        weights_NG = (advantages_NG / self.temperature).exp().clamp(max=self.cap)
        return of_samples(weights_NG, rewards_NK)

    def coefficients(self, groups: Groups) -> Tensor:
        return mean_over_sample_tokens(self.advantages(groups.rewards_NK), groups)[None]
