"""LUFFY: GRPO with the reference as one more member of the group, its tokens' ratios shaped.

    loss = -(1/N) sum_n (1/Z_n) [ sum_t f(p_t) A_y + sum_i sum_t min(rho A_i, clip(rho) A_i) ]
    f(p) = p / (p + 0.1),    p_t = pi(y_t),    Z_n = |y| + sum_i |o_i|
    A    = (r - mean) / sigma over all members of the group, the reference included

The probability of the reference under the policy that wrote it is taken as 1, so that its ratio is
p. f raises the share of unlikely tokens in the gradient: in logp, its slope is 0.1 p / (p + 0.1)^2,
where that of p is p. Samples' ratios are clipped, the reference's is not.

The authors' runs have a constant in place of Z, no division by sigma, and no clip.

Source: arXiv 2504.14945, section 3: mixed-policy GRPO, with Z and advantages over both parts, and
policy shaping by f with gamma = 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grao_fast.kernels import group_advantages
from grao_fast.objectives.base import Groups, Objective


@dataclass(frozen=True)
class LUFFY(Objective):
    """Learning to reason under off-policy guidance; its terms are of samples and of references."""

    terms: ClassVar[tuple[str, ...]] = ("policy", "imitation")
    shaping: ClassVar[str | None] = "luffy"

    def advantages(self, rewards_NK: Tensor) -> Tensor:
        return group_advantages(rewards_NK.double())

    def coefficients(self, groups: Groups) -> Tensor:
        present_NK = groups.present_NK
        tokens_N1 = groups.length_NK.where(present_NK, 0).sum(1, keepdim=True).clamp(min=1)
        weights_NK = self.advantages(groups.rewards_NK).where(present_NK, 0.0)
        coefficients_2NK = torch.zeros(2, *weights_NK.shape, dtype=torch.float64)
        coefficients_2NK[0, :, :-1] = weights_NK[:, :-1]
        coefficients_2NK[1, :, -1] = weights_NK[:, -1]
        return coefficients_2NK / (tokens_N1 * len(tokens_N1))
