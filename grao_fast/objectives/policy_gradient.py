"""REINFORCE and RLOO: the policy gradient of whole sequences, with a baseline.

    loss = -mean_i A_i log pi(o_i),    log pi(o) = sum_t log pi(o_t)

    REINFORCE   A_i = r_i - mean reward of all samples of the step; the mean is over these
    RLOO        A_i = r_i - mean reward of the group's other samples; the mean is over the samples
                of a prompt, then over prompts

log pi(o) is a sum over tokens, not a mean: a completion is one action. REINFORCE's baseline needs
no group: it also serves one sample a prompt, where RLOO has no baseline and A = 0. The authors'
REINFORCE has a moving average over earlier steps; that of one step needs no state, and contains the
sample's own reward, which shrinks the gradient by 1/n for n samples.

Off policy, each token has its own clipped ratio. TRL 1.16 clips the ratio of the whole sequence in
RLOO, and takes the KL penalty from the reward; here it is a term of the loss.

Source: arXiv 2402.14740, Eq. 6-8 (REINFORCE), and RLOO's estimator below them, which is from Kool
et al., "Buy 4 REINFORCE samples, get a baseline for free!", 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grao_fast.objectives.base import Groups, Objective
from grao_fast.objectives.statistics import (
    centred,
    of_samples,
    sample_counts,
    sample_rewards,
)


@dataclass(frozen=True)
class REINFORCE(Objective):
    """The policy gradient with the step's mean reward as its baseline."""

    uses_references: ClassVar[bool] = False

    def advantages(self, rewards_NK: Tensor) -> Tensor:
        advantages_NG = centred(sample_rewards(rewards_NK), of_step=True)
        return of_samples(advantages_NG, rewards_NK)

    def coefficients(self, groups: Groups) -> Tensor:
        samples = (~groups.rewards_NK[:, :-1].isnan()).sum().clamp(min=1)
        return _of_present(self.advantages(groups.rewards_NK) / samples, groups)[None]


@dataclass(frozen=True)
class RLOO(Objective):
    """The policy gradient with the mean reward of a prompt's other samples as its baseline."""

    uses_references: ClassVar[bool] = False

    def advantages(self, rewards_NK: Tensor) -> Tensor:
        counts_N1 = sample_counts(rewards_NK)
        # r_i minus the mean of the others is G / (G - 1) times r_i minus the mean of all.
        scale_N1 = counts_N1 / (counts_N1 - 1).clamp(min=1)
        advantages_NG = scale_N1 * centred(sample_rewards(rewards_NK))
        return of_samples(advantages_NG, rewards_NK)

    def coefficients(self, groups: Groups) -> Tensor:
        weights_NK = self.advantages(groups.rewards_NK) / sample_counts(groups.rewards_NK)
        return _of_present(weights_NK / len(weights_NK), groups)[None]


def _of_present(weights_NK: Tensor, groups: Groups) -> Tensor:
    return torch.where(groups.present_NK, weights_NK, 0.0)
