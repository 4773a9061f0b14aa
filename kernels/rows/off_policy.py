"""Forms: how a row's coefficient and value follow from the row's own log-prob.

Without a form, a row of weight w adds w logp to the objective, and w is its coefficient, what
multiplies the gradient of -logp. A form replaces both by functions of the row's own log-prob, so
that the loss still takes one pass. To add one, write its two functions here and its coefficient in
`triton_forms.py`, and enter it in `FORMS` and in `triton_forms._form_coefficient`.

"clipped_ratio": a row adds w value - kl_coef kl, with

    value = logp, or off policy rho = exp(logp - old), clipped as in PPO: at or below `high` where
            w > 0, at or above `low` where w < 0; times the importance weight, a constant
    importance weight = min(exp(old - sampler), importance_cap)
    kl    = exp(ref - logp) - (ref - logp) - 1

    coefficient = w importance weight (rho, or 0 where it is clipped)
                + kl_coef (exp(ref - logp) - 1)

Sources: arXiv 1707.06347 (the clipped ratio), Schulman 2020, "Approximating KL Divergence" (k3).
Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class OffPolicyRows(NamedTuple):
    """Constants of each row. A log-prob of NaN means none: then rho = 1, the weight 1, the KL 0."""

    form: str
    logprob_3R: Tensor  # old, sampler, ref; float32
    kl_coef_R: Tensor  # float32
    low: float
    high: float
    importance_cap: float

    @property
    def bounds(self) -> tuple[float, float, float]:
        return self.low, self.high, self.importance_cap

    def rows(self, start: int, stop: int) -> OffPolicyRows:
        return self._replace(
            logprob_3R=self.logprob_3R[:, start:stop], kl_coef_R=self.kl_coef_R[start:stop]
        )


class Form(NamedTuple):
    number: int  # FORM of the Triton kernel; 0 is no form
    coefficient: Callable[[Tensor, Tensor, OffPolicyRows], Tensor]
    value: Callable[[Tensor, Tensor, OffPolicyRows], tuple[Tensor, Tensor]]


def row_coefficient(weight_R: Tensor, logprob_R: Tensor, constants: OffPolicyRows) -> Tensor:
    """Return the coefficient of the gradient of -logp."""
    return FORMS[constants.form].coefficient(weight_R, logprob_R, constants)


def row_value(
    weight_R: Tensor, logprob_R: Tensor, constants: OffPolicyRows
) -> tuple[Tensor, Tensor]:
    """Return the value that the weight multiplies in the objective, and the row's KL."""
    return FORMS[constants.form].value(weight_R, logprob_R, constants)


class _Ratio(NamedTuple):
    on_policy_R: Tensor
    rho_R: Tensor
    clipped_R: Tensor
    importance_R: Tensor


def _clipped_ratio_coefficient(
    weight_R: Tensor, logprob_R: Tensor, constants: OffPolicyRows
) -> Tensor:
    """At a ratio of exactly 1, and without a KL, this is `weight_R` to the bit."""
    ratio = _ratio(weight_R, logprob_R, constants)
    slope_R = torch.where(ratio.clipped_R == ratio.rho_R, ratio.rho_R, 0)
    gap_R = constants.logprob_3R[2] - logprob_R
    # Rows of zero weight may hold inf; skip them, since 0 * inf is NaN.
    without_kl_R = gap_R.isnan() | (constants.kl_coef_R == 0)
    pull_R = torch.where(without_kl_R, 0, constants.kl_coef_R * gap_R.expm1())
    return torch.where(weight_R == 0, 0, weight_R * ratio.importance_R * slope_R) + pull_R


def _clipped_ratio_value(
    weight_R: Tensor, logprob_R: Tensor, constants: OffPolicyRows
) -> tuple[Tensor, Tensor]:
    ratio = _ratio(weight_R, logprob_R, constants)
    value_R = ratio.importance_R * torch.where(ratio.on_policy_R, logprob_R, ratio.clipped_R)
    gap_R = constants.logprob_3R[2] - logprob_R
    return value_R, torch.where(gap_R.isnan(), 0, gap_R.expm1() - gap_R)


def _ratio(weight_R: Tensor, logprob_R: Tensor, constants: OffPolicyRows) -> _Ratio:
    old_R, sampler_R, _ = constants.logprob_3R
    low, high, importance_cap = constants.bounds
    on_policy_R = old_R.isnan()
    old_R = torch.where(on_policy_R, logprob_R, old_R)
    rho_R = (logprob_R - old_R).exp()
    clipped_R = torch.where(weight_R > 0, rho_R.clamp(max=high), rho_R.clamp(min=low))
    importance_R = (old_R - sampler_R).exp().clamp(max=importance_cap)
    return _Ratio(on_policy_R, rho_R, clipped_R, torch.where(sampler_R.isnan(), 1, importance_R))


FORMS = {"clipped_ratio": Form(1, _clipped_ratio_coefficient, _clipped_ratio_value)}
