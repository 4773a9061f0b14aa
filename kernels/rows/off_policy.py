"""What a row is worth off policy: ratio, importance weight and KL, from its own log-prob.

A row of weight w adds to the objective w * value, and takes from it kl_coef * kl:

    value = logp, or off policy the ratio rho = exp(logp - old), held as in PPO: at or below `high`
            where w > 0, at or above `low` where w < 0
    kl    = exp(ref - logp) - (ref - logp) - 1

`value` is multiplied by the truncated importance weight min(exp(old - sampler), cap), a constant.
So what multiplies the gradient of -log p[target] depends on the row alone, and one pass does it:

    coefficient = w * min(exp(old - sampler), cap) * (rho, or 0 where it is held)
                + kl_coef * (exp(ref - logp) - 1)

Sources: arXiv 1707.06347 (the clipped ratio), Schulman 2020, "Approximating KL Divergence" (k3).
Shapes: R rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Policy(NamedTuple):
    """Constants of each row; NaN where it has none: then rho = 1, the weight 1, the KL 0."""

    logprob_3R: Tensor  # old, sampler, ref; float32
    kl_coef_R: Tensor  # float32
    low: float
    high: float
    cap: float

    def rows(self, start: int, stop: int) -> Policy:
        return self._replace(
            logprob_3R=self.logprob_3R[:, start:stop], kl_coef_R=self.kl_coef_R[start:stop]
        )


class _Ratio(NamedTuple):
    on_policy_R: Tensor
    rho_R: Tensor
    held_R: Tensor
    importance_R: Tensor


def row_coefficient(weight_R: Tensor, logprob_R: Tensor, policy: Policy) -> Tensor:
    """What multiplies the gradient of -logp; at a ratio of exactly 1, `weight_R` to the bit."""
    ratio = _ratio(weight_R, logprob_R, policy)
    slope_R = torch.where(ratio.held_R == ratio.rho_R, ratio.rho_R, 0)
    gap_R = policy.logprob_3R[2] - logprob_R
    # What weighs nothing may hold anything: 0 * inf would be NaN.
    unpulled_R = gap_R.isnan() | (policy.kl_coef_R == 0)
    pull_R = torch.where(unpulled_R, 0, policy.kl_coef_R * gap_R.expm1())
    return torch.where(weight_R == 0, 0, weight_R * ratio.importance_R * slope_R) + pull_R


def row_value(weight_R: Tensor, logprob_R: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
    """`value`, importance weight included, and `kl`."""
    ratio = _ratio(weight_R, logprob_R, policy)
    value_R = ratio.importance_R * torch.where(ratio.on_policy_R, logprob_R, ratio.held_R)
    gap_R = policy.logprob_3R[2] - logprob_R
    return value_R, torch.where(gap_R.isnan(), 0, gap_R.expm1() - gap_R)


def _ratio(weight_R: Tensor, logprob_R: Tensor, policy: Policy) -> _Ratio:
    old_R, sampler_R, _ = policy.logprob_3R
    on_policy_R = old_R.isnan()
    old_R = torch.where(on_policy_R, logprob_R, old_R)
    rho_R = (logprob_R - old_R).exp()
    held_R = torch.where(weight_R > 0, rho_R.clamp(max=policy.high), rho_R.clamp(min=policy.low))
    importance_R = (old_R - sampler_R).exp().clamp(max=policy.cap)
    return _Ratio(on_policy_R, rho_R, held_R, torch.where(sampler_R.isnan(), 1, importance_R))
