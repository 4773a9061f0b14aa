"""A row between its two passes: what the sums over its logits come to, and what they lead to.

    Statistics    sums over a vocabulary, or over one process's part of it
    Outcome       log-prob, entropy and top-1 hit, from the sums over the whole
    Factors       what the gradient of a row is made of, besides its logits

The Triton kernel that has a whole row does the same arithmetic itself, in `row_functions.py`.
Shapes: R rows; all are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .policy import Policy, row_coefficient


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
    """dlogits = scale (exp(z - peak), or -others at the target) dz/dx
    - pull exp(z - peak) (z - peak - mean_gap) dz/dx."""

    peak_R: Tensor
    others_R: Tensor
    scale_R: Tensor  # weight / sum of exp(gap)
    pull_R: Tensor | None  # entropy weight / sum of exp(gap)
    mean_gap_R: Tensor | None  # E[gap]


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
) -> Factors:
    """Of a row of this weight; a policy turns it into the row's coefficient by its log-prob."""
    if policy is not None:
        weight_R = row_coefficient(weight_R, logprob_R, policy)
    total_R = (statistics.target_z_R - statistics.peak_R).exp() + statistics.others_R
    pull_R = mean_gap_R = None
    if entropy_weight_R is not None:
        whole_R = statistics.rest_R + statistics.ties_R
        pull_R, mean_gap_R = entropy_weight_R / whole_R, statistics.spread_R / whole_R
    return Factors(statistics.peak_R, statistics.others_R, weight_R / total_R, pull_R, mean_gap_R)


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
