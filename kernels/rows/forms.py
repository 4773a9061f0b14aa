"""Forms: how a row's value and coefficient follow from the row's own log-prob.

Without a form, a row of weight w adds w logp to the objective, and its coefficient, what multiplies
the gradient of -logp, is w. With forms, it adds w value - kl_coef kl, and its coefficient follows
from its own log-prob, so that the loss still takes one pass:

    coefficient = w d value / d logp + kl_coef (exp(ref - logp) - 1),   sg(.) being a constant
    kl          = exp(ref - logp) - (ref - logp) - 1

Where the KL is multiplied by the ratio rho = exp(logp - old), both are taken of rho kl, whose part
of the coefficient is kl_coef rho (ref - logp).

A row has a ratio rho = exp(logp - old), and an importance weight min(exp(old - sampler), cap):

    "clipped"     value = importance weight times rho, or logp where the row is on policy; rho is at
                  or below `high` where w > 0, at or above `low` where w < 0
    "truncated"   value = importance weight times sg(rho between `low` and `high`) logp

or it is shaped, and its probability p = exp(logp) takes the place of both:

    "dft"         value = sg(p) logp             coefficient w p
    "chord"       value = sg(p (1 - p)) logp     coefficient w p (1 - p)
    "luffy"       value = p / (p + 0.1)          coefficient w 0.1 p / (p + 0.1)^2

To add a form, write its function here and its coefficient in `triton_forms.py`, and enter it in
`RATIOS` or `SHAPINGS` and in the device function that chooses among them.

Sources: arXiv 1707.06347 (the clipped ratio), 2506.13585 (CISPO, the truncated one), 2508.05629
(DFT), 2508.11408 (CHORD), 2504.14945 (LUFFY); Schulman 2020, "Approximating KL Divergence" (k3).
Shapes: R rows, P planes of constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LUFFY_GAMMA = 0.1  # of the paper


class FormRows(NamedTuple):
    """The forms of a pass, and the constants of each row.

    A log-prob of NaN means none: then rho = 1, the importance weight 1, the KL 0. What a shaped row
    holds for old and sampler has no effect.
    """

    ratio: str
    shaping: str | None
    constants_PR: Tensor  # float32: old, sampler, ref; with a shaping also 1 in shaped rows, else 0
    kl_coef_R: Tensor  # float32
    low: float
    high: float
    importance_cap: float
    kl_times_ratio: bool = False

    @property
    def bounds(self) -> tuple[float, float, float]:
        return self.low, self.high, self.importance_cap

    def rows(self, start: int, stop: int) -> FormRows:
        return self._replace(
            constants_PR=self.constants_PR[:, start:stop], kl_coef_R=self.kl_coef_R[start:stop]
        )


class Value(NamedTuple):
    """A row's value and its derivative in the row's log-prob."""

    value_R: Tensor
    slope_R: Tensor


class Ratio(NamedTuple):
    number: int  # RATIO of the Triton kernel; 0 is no form
    value: Callable[[Tensor, Tensor, Tensor, FormRows], Value]


class Shape(NamedTuple):
    number: int  # SHAPING of the Triton kernel; 0 is none
    value: Callable[[Tensor], Value]


def row_coefficient(weight_R: Tensor, logprob_R: Tensor, rows: FormRows) -> Tensor:
    """Return the coefficient of the gradient of -logp.

    At a ratio of exactly 1, without a KL or a shaping, this is `weight_R` to the bit.
    """
    (_, slope_R), importance_R = _row_value(weight_R, logprob_R, rows)
    gap_R = rows.constants_PR[2] - logprob_R
    # Rows of zero weight may hold inf; skip them, since 0 * inf is NaN.
    without_kl_R = gap_R.isnan() | (rows.kl_coef_R == 0)
    slope_of_kl_R = _rho(logprob_R, rows) * gap_R if rows.kl_times_ratio else gap_R.expm1()
    pull_R = torch.where(without_kl_R, 0, rows.kl_coef_R * slope_of_kl_R)
    return torch.where(weight_R == 0, 0, weight_R * importance_R * slope_R) + pull_R


def row_value(weight_R: Tensor, logprob_R: Tensor, rows: FormRows) -> tuple[Tensor, Tensor]:
    """Return the value that the weight multiplies in the objective, and the row's KL."""
    (value_R, _), importance_R = _row_value(weight_R, logprob_R, rows)
    gap_R = rows.constants_PR[2] - logprob_R
    kl_R = torch.where(gap_R.isnan(), 0, gap_R.expm1() - gap_R)
    if rows.kl_times_ratio:
        kl_R = _rho(logprob_R, rows) * kl_R
    return importance_R * value_R, kl_R


def _rho(logprob_R: Tensor, rows: FormRows) -> Tensor:
    """The ratio exp(logp - old), 1 on policy and in shaped rows."""
    old_R = rows.constants_PR[0]
    without_R = old_R.isnan()
    if rows.shaping is not None:
        without_R = without_R | (rows.constants_PR[3] != 0)
    return torch.where(without_R, 1, (logprob_R - old_R).exp())


def _row_value(weight_R: Tensor, logprob_R: Tensor, rows: FormRows) -> tuple[Value, Tensor]:
    """Value and slope by the row's form, and the importance weight to multiply them by."""
    old_R, sampler_R = rows.constants_PR[:2]
    old_R = torch.where(old_R.isnan(), logprob_R, old_R)
    value = RATIOS[rows.ratio].value(weight_R, logprob_R, (logprob_R - old_R).exp(), rows)
    importance_R = (old_R - sampler_R).exp().clamp(max=rows.importance_cap)
    importance_R = torch.where(sampler_R.isnan(), 1, importance_R)
    if rows.shaping is None:
        return value, importance_R
    shaped_R = rows.constants_PR[3] != 0
    shaped = SHAPINGS[rows.shaping].value(logprob_R)
    value = Value(*(torch.where(shaped_R, *each) for each in zip(shaped, value, strict=True)))
    return value, torch.where(shaped_R, 1, importance_R)


def _clipped(weight_R: Tensor, logprob_R: Tensor, rho_R: Tensor, rows: FormRows) -> Value:
    held_R = torch.where(weight_R > 0, rho_R.clamp(max=rows.high), rho_R.clamp(min=rows.low))
    value_R = torch.where(rows.constants_PR[0].isnan(), logprob_R, held_R)
    return Value(value_R, torch.where(held_R == rho_R, rho_R, 0))


def _truncated(weight_R: Tensor, logprob_R: Tensor, rho_R: Tensor, rows: FormRows) -> Value:
    return _constant_times(rho_R.clamp(rows.low, rows.high), logprob_R)


def _dft(logprob_R: Tensor) -> Value:
    return _constant_times(logprob_R.exp(), logprob_R)


def _chord(logprob_R: Tensor) -> Value:
    return _constant_times(logprob_R.exp() * -logprob_R.expm1(), logprob_R)


def _luffy(logprob_R: Tensor) -> Value:
    p_R = logprob_R.exp()
    value_R = p_R / (p_R + LUFFY_GAMMA)
    return Value(value_R, value_R * LUFFY_GAMMA / (p_R + LUFFY_GAMMA))


def _constant_times(constant_R: Tensor, logprob_R: Tensor) -> Value:
    """sg(constant) logp; 0 where the constant is, though logp may be -inf there."""
    return Value(torch.where(constant_R == 0, 0, constant_R * logprob_R), constant_R)


RATIOS = {"clipped": Ratio(1, _clipped), "truncated": Ratio(2, _truncated)}
SHAPINGS = {"dft": Shape(1, _dft), "chord": Shape(2, _chord), "luffy": Shape(3, _luffy)}
