"""A row between its two passes: what the sums over its logits come to, and what they lead to.

    Statistics                 sums over a vocabulary, or over one process's part of it
    Outcome                    log-prob, entropy and top-1 hit, from the sums over the whole
    Factors, TargetGradient    what the gradient of a row is made of, besides its logits

The Triton kernel that has a whole row does the same arithmetic itself, in `triton_functions.py`.
Shapes: R rows; all are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import LogitTransform
from .off_policy import Policy, row_coefficient


class Statistics(NamedTuple):
    """With gap = z - peak. The last three are there for the entropy, and unset without it.

    Targets and peaks are kept out of the sums: 1 - p of a target that is nearly certain, and the
    log of a total that is nearly 1, then have all their digits.
    """

    peak_R: Tensor  # max z
    target_z_R: Tensor  # -inf where the target is in another part of the vocabulary
    others_R: Tensor  # sum of exp(gap) but the target's
    rest_R: Tensor  # sum of exp(gap) below the maximum
    ties_R: Tensor  # how often the maximum occurs
    spread_R: Tensor  # sum of exp(gap) gap


class Outcome(NamedTuple):
    logprob_R: Tensor
    entropy_R: Tensor | None
    top1_R: Tensor | None


class Factors(NamedTuple):
    """dlogits = exp(z - peak) (scale - pull (z - peak - mean_gap)) dz/dx, but for the target's."""

    peak_R: Tensor
    scale_R: Tensor  # weight / sum of exp(gap)
    pull_R: Tensor | None  # entropy weight / sum of exp(gap)
    mean_gap_R: Tensor | None  # E[gap]


class TargetGradient(NamedTuple):
    """The target's element of dlogits, which is kept apart from the others, in float32.

    It outweighs them all: rounded to 16 bits, or summed up together with them, it would lose digits
    that are worth more than they are. `grad_R` is weight (p - 1) dz/dx, a quotient and a product,
    each rounded, and dlogits then holds 0; or, where p is below 1/1024, -weight dz/dx without that
    rounding, and dlogits holds the rest.
    """

    grad_R: Tensor
    whole_R: Tensor  # bool: whether it is all of it


# others / exp(gap of the target), from which on the target's p stays among the others.
APART_FROM = 1024.0


def row_outcome(statistics: Statistics, entropy: bool, top1: bool) -> Outcome:
    """log p[target] and, where asked for, -sum p log p and whether no token is likelier."""
    peak_R, target_z_R, others_R, rest_R, ties_R, spread_R = statistics
    target_gap_R = target_z_R - peak_R
    target_exp_R = target_gap_R.exp()
    # (z - max) - log(sum), not z - lse: with logits of 1e4 a float32 lse is off by 1e-3.
    logprob_R = torch.where(
        others_R < target_exp_R,
        -torch.log1p(others_R / target_exp_R),
        target_gap_R - (target_exp_R + others_R).log(),
    )
    entropy_R = None
    if entropy:
        total_R = rest_R + ties_R
        log_total_R = torch.where(ties_R == 1, rest_R.log1p(), total_R.log())
        entropy_R = log_total_R - spread_R / total_R
    return Outcome(logprob_R, entropy_R, (target_gap_R == 0).float() if top1 else None)


def row_factors(
    statistics: Statistics,
    logprob_R: Tensor,
    weight_R: Tensor,
    entropy_weight_R: Tensor | None,
    policy: Policy | None,
    transform: LogitTransform,
) -> tuple[Factors, TargetGradient]:
    """Of a row of this weight; a policy turns it into the row's coefficient by its log-prob."""
    if policy is not None:
        weight_R = row_coefficient(weight_R, logprob_R, policy)
    gap_R = statistics.target_z_R - statistics.peak_R
    target_exp_R = gap_R.exp()
    scale_R = weight_R / (target_exp_R + statistics.others_R)
    whole_grad_R = -scale_R * statistics.others_R
    pull_R = mean_gap_R = None
    if entropy_weight_R is not None:
        total_R = statistics.rest_R + statistics.ties_R
        pull_R, mean_gap_R = entropy_weight_R / total_R, statistics.spread_R / total_R
        # Of a target that is as good as impossible, -inf * 0 would be NaN.
        pulled_R = target_exp_R * (gap_R.clamp(min=-128) - mean_gap_R)
        whole_grad_R = whole_grad_R - pull_R * pulled_R
    whole_R = statistics.others_R < APART_FROM * target_exp_R
    slope_R = transform.slope
    if transform.cap is not None:
        slope_R = transform.slope * (1 - (statistics.target_z_R / transform.cap).square())
    target = TargetGradient(torch.where(whole_R, whole_grad_R, -weight_R) * slope_R, whole_R)
    return Factors(statistics.peak_R, scale_R, pull_R, mean_gap_R), target


def mark_dead(
    outcome: Outcome, weight_R: Tensor, entropy_weight_R: Tensor | None, policy: Policy | None
) -> None:
    """NaN, in place, for rows of which all weights are 0."""
    dead_R = weight_R == 0
    if entropy_weight_R is not None:
        dead_R &= entropy_weight_R == 0
    if policy is not None:
        dead_R &= policy.kl_coef_R == 0
    for values_R in outcome:
        if values_R is not None:
            values_R.masked_fill_(dead_R, torch.nan)


def store(
    outcome: Outcome, logprob_R: Tensor, entropy_R: Tensor | None, top1_R: Tensor | None
) -> None:
    """Write an outcome where the caller wants it."""
    for out_R, values_R in zip((logprob_R, entropy_R, top1_R), outcome, strict=True):
        if out_R is not None and values_R is not None:
            out_R.copy_(values_R)
