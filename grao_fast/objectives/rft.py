"""Rejection-sampled fine-tuning: SFT on the samples that have the highest rewards.

    loss = -(sum_s k_s sum_t log pi(s_t)) / (sum_s k_s |s|)

k_s is 1 for a sample that is kept, else 0. Kept are the `best` samples of each group, among those
whose reward is at least `threshold`. Samples that tie for the last places share them equally:
with best=1, two samples of the highest reward have k = 1/2 each.

`RFT()` is RAFT (arXiv 2304.06767, Algorithm 1), the best of the group, even of one whose rewards
are all equal. `RFT(best=None, threshold=1.0)` with a reward of 0 or 1 is rejection-sampling
fine-tuning on all correct samples (arXiv 2308.01825), which also removes duplicates;
they stay here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grao_fast.objectives.base import Groups, Objective
from grao_fast.objectives.options import check_number
from grao_fast.objectives.statistics import mean_over_all_tokens, of_samples, sample_rewards
from grao_fast.system.errors import UserError


@dataclass(frozen=True)
class RFT(Objective):
    """SFT on the best samples.

    best: samples that are kept of each group; None: all that reach the threshold.
    threshold: the lowest reward of a sample that is kept; None: none is too low.
    """

    best: int | None = 1
    threshold: float | None = None

    uses_references: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best is None and self.threshold is None:
            raise UserError(
                "RFT with best=None and threshold=None keeps every sample: set best, threshold or "
                "both"
            )
        if self.best is not None:
            check_number(self, "best", least=1)

    @property
    def has_dead_groups(self) -> bool:
        return self.threshold is not None

    def advantages(self, rewards_NK: Tensor) -> Tensor:
        return of_samples(self._kept(sample_rewards(rewards_NK)), rewards_NK)

    def coefficients(self, groups: Groups) -> Tensor:
        # A sample without tokens cannot be imitated, so it takes no place.
        kept_NK = self.advantages(groups.rewards_NK.where(groups.present_NK, torch.nan))
        kept_NK = kept_NK.nan_to_num(0.0)
        return mean_over_all_tokens(kept_NK, kept_NK, groups)[None]

    def _kept(self, rewards_NG: Tensor) -> Tensor:
        """(N, G) 1 for a sample that is kept, a share for one that ties, else 0."""
        able_NG = ~rewards_NG.isnan()
        if self.threshold is not None:
            able_NG &= rewards_NG >= self.threshold
        if self.best is None:
            return able_NG.double()
        rewards_NG = rewards_NG.where(able_NG, -torch.inf)
        better_NG = (rewards_NG[:, None] > rewards_NG[:, :, None]).sum(2)
        equal_NG = (rewards_NG[:, None] == rewards_NG[:, :, None]).sum(2)
        kept_NG = ((self.best - better_NG) / equal_NG.double()).clamp(min=0, max=1)
        return torch.where(able_NG, kept_NG, 0.0)
