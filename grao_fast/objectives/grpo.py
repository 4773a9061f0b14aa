"""GRPO, and Dr. GRPO, which leaves out two of its normalisations.

    loss = -(1/N) sum_n (1/G) sum_i A_i S_i

    GRPO       A_i = (r_i - mean) / sigma,    S_i = (1/|o_i|) sum_t v_it
    Dr. GRPO   A_i = r_i - mean,              S_i = (1/M) sum_t v_it,    M = max_new_tokens

over N prompts and the G samples of each. v_t is log pi(o_t) on policy; off policy, it is the ratio
rho = pi / pi_old, clipped as in PPO: min(A rho, A clip(rho, 1 - low, 1 + high)) / A. At rho = 1 the
two have one gradient. A KL term is the trainer's `kl_coef`.

The reference takes no part: its reward is in neither mean nor sigma, and its weight is 0. A group
whose rewards are all equal has A = 0, by a test for equality; there is no epsilon beside sigma.

GRPO's paper does not say which standard deviation it divides by. Here it is the population's, as in
GRAO; `sigma="sample"` divides the squares by G - 1, as TRL 1.16 does, which also adds 1e-4 to it:
A is sqrt((G - 1) / G) times as large, 0.94 for 8 samples.

Sources: arXiv 2402.03300, Eq. 3 and section 4.1.2 (GRPO); arXiv 2503.20783, section 3.2 and its
Listing 1, which has M (Dr. GRPO).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from grao_fast.kernels import group_advantages
from grao_fast.objectives.base import Groups, Objective, mean_over_tokens
from grao_fast.objectives.statistics import (
    centred,
    of_samples,
    sample_counts,
    sample_rewards,
)


@dataclass(frozen=True)
class GRPO(Objective):
    """Group relative policy optimisation.

    sigma: "population" or "sample", the standard deviation of a group's rewards.
    """

    sigma: Literal["population", "sample"] = "population"

    uses_references: ClassVar[bool] = False

    def advantages(self, rewards_NK: Tensor) -> Tensor:
        advantages_NG = group_advantages(rewards_NK.double(), statistics="samples")[:, :-1]
        if self.sigma == "sample":
            counts_N1 = sample_counts(rewards_NK)
            advantages_NG = advantages_NG * ((counts_N1 - 1) / counts_N1).sqrt()
        return of_samples(advantages_NG, rewards_NK)

    def coefficients(self, groups: Groups) -> Tensor:
        weights_NK = self.advantages(groups.rewards_NK) / sample_counts(groups.rewards_NK)
        return mean_over_tokens(weights_NK / len(weights_NK), groups)[None]


@dataclass(frozen=True)
class DrGRPO(Objective):
    """GRPO without division by the standard deviation and by the sample's own length."""

    uses_references: ClassVar[bool] = False

    def advantages(self, rewards_NK: Tensor) -> Tensor:
        return of_samples(centred(sample_rewards(rewards_NK)), rewards_NK)

    def coefficients(self, groups: Groups) -> Tensor:
        weights_NK = self.advantages(groups.rewards_NK) / sample_counts(groups.rewards_NK)
        weights_NK = weights_NK / (len(weights_NK) * groups.max_new_tokens)
        return torch.where(groups.present_NK, weights_NK, 0.0)[None]
