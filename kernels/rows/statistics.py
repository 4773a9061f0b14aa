"""The sums over a row's logits, and what follows from them: log-prob, entropy, gradient factors.

    Statistics                 sums over a vocabulary, or over one process's shard of it
    Outcome                    log-prob, entropy and top-1 hit, from the sums over the whole
    Factors, TargetGradient    what the gradient of a row is made of, besides its logits

The Triton kernel that reads whole rows has the same arithmetic in `triton_functions.py`.
Shapes: R rows; all are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .contract import LogitConstants, RowInputs, RowOutputs
from .forms import row_coefficient


class Statistics(NamedTuple):
    """Sums with gap = z - peak. The last three serve the entropy, and are unset without it.

    The target is kept out of `others` and the peaks out of `rest`, so that 1 - p of a nearly
    certain target, and the log of a total near 1, keep full precision.
    """

    peak_R: Tensor  # max z
    target_z_R: Tensor  # -inf where the target is in another shard
    others_R: Tensor  # sum of exp(gap) over all tokens but the target
    rest_R: Tensor  # sum of exp(gap) below the maximum
    ties_R: Tensor  # how often the maximum occurs
    spread_R: Tensor  # sum of exp(gap) gap


class Outcome(NamedTuple):
    logprob_R: Tensor
    entropy_R: Tensor | None
    top1_R: Tensor | None


class Factors(NamedTuple):
    """dlogits = exp(z - peak) (scale - pull (z - peak - mean_gap)) dz/dx, except at the target."""

    peak_R: Tensor
    scale_R: Tensor  # weight / sum of exp(gap)
    pull_R: Tensor | None  # entropy weight / sum of exp(gap)
    mean_gap_R: Tensor | None  # E[gap]


class TargetGradient(NamedTuple):
    """The target's element of dlogits, kept in float32 and apart from the others.

    It is the largest element by far: rounding it to 16 bits, or summing it with the others, costs
    more than the others are worth. Where p < 1/1024, `grad_R` is -weight dz/dx, which needs no
    rounding, and dlogits holds the rest, weight p dz/dx. Elsewhere `grad_R` is all of it,
    weight (p - 1) dz/dx, and dlogits holds 0.
    """

    grad_R: Tensor
    whole_R: Tensor  # bool: whether grad_R is all of the target's gradient


# Where others / exp(target's gap) reaches this, dlogits holds the target's p: p < 1/1024.
APART_FROM = 1024.0


def row_outcome(statistics: Statistics, entropy: bool, top1: bool) -> Outcome:
    """log p[target] and, on request, -sum p log p and 1 where no token is likelier."""
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
    statistics: Statistics, logprob_R: Tensor, inputs: RowInputs, constants: LogitConstants
) -> tuple[Factors, TargetGradient]:
    """Return the factors of each row's gradient; with a form, of its coefficient."""
    weight_R, entropy_weight_R = inputs.weight_R, inputs.entropy_weight_R
    if inputs.forms is not None:
        weight_R = row_coefficient(weight_R, logprob_R, inputs.forms)
    gap_R = statistics.target_z_R - statistics.peak_R
    target_exp_R = gap_R.exp()
    scale_R = weight_R / (target_exp_R + statistics.others_R)
    whole_grad_R = -scale_R * statistics.others_R
    pull_R = mean_gap_R = None
    if entropy_weight_R is not None:
        total_R = statistics.rest_R + statistics.ties_R
        pull_R, mean_gap_R = entropy_weight_R / total_R, statistics.spread_R / total_R
        # The gap of an impossible target is -inf, and -inf * 0 is NaN.
        pulled_R = target_exp_R * (gap_R.clamp(min=-128) - mean_gap_R)
        whole_grad_R = whole_grad_R - pull_R * pulled_R
    whole_R = statistics.others_R < APART_FROM * target_exp_R
    slope_R = constants.slope
    if constants.cap is not None:
        slope_R = constants.slope * (1 - (statistics.target_z_R / constants.cap).square())
    target = TargetGradient(torch.where(whole_R, whole_grad_R, -weight_R) * slope_R, whole_R)
    return Factors(statistics.peak_R, scale_R, pull_R, mean_gap_R), target


def store(outcome: Outcome, inputs: RowInputs, outputs: RowOutputs) -> None:
    """Write an outcome to where the caller wants it, as NaN in dead rows."""
    dead_R = inputs.weight_R == 0
    if inputs.entropy_weight_R is not None:
        dead_R &= inputs.entropy_weight_R == 0
    if inputs.forms is not None:
        dead_R &= inputs.forms.kl_coef_R == 0
    wanted = (outputs.logprob_R, outputs.entropy_R, outputs.top1_R)
    for out_R, values_R in zip(wanted, outcome, strict=True):
        if out_R is not None and values_R is not None:
            out_R.copy_(values_R.masked_fill_(dead_R, torch.nan))
