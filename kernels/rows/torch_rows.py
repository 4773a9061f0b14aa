"""The row functions in PyTorch, for the CPU and for any device without Triton.

It is the arithmetic of `triton_kernels.py`. On the CPU a slab of logits does not fit in the cache,
so it is worked through in blocks of rows that do: memory is read and written once, the exponential
is taken once, and nothing the size of the slab is allocated.

Shapes: R rows of a slab, B of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checks import LogitTransform
from .off_policy import Policy
from .statistics import (
    Factors,
    Statistics,
    mark_dead,
    row_factors,
    row_outcome,
    store,
)

# Logits of one block: they stay in the last-level cache over the five passes. At 1 MiB they would
# stay in a core's own cache, which gains nothing here (the passes take 1.3 ns a logit, the GEMMs
# 41), and threads would have to meet eight times as often, which costs dear on a busy machine.
_CPU_BLOCK_BYTES = 8 * 2**20

# Of z - max where it is multiplied by its exponential, which is 0 there: 0 * -inf would be NaN.
_GAP_FLOOR = -128.0


def weighted_ce_rows(
    logits_RV: Tensor,
    dlogits_RV: Tensor | None,
    target_grad_R: Tensor | None,
    bias_V: Tensor | None,
    target_R: Tensor,
    weight_R: Tensor,
    logprob_R: Tensor,
    transform: LogitTransform,
    entropy_R: Tensor | None = None,
    entropy_weight_R: Tensor | None = None,
    top1_R: Tensor | None = None,
    policy: Policy | None = None,
) -> None:
    """logprob = log softmax(z)[target] and dlogits = weight (softmax(z) - onehot) dz/dx.

    And, where asked for, entropy = -sum p log p with p = softmax(z), whose gradient in z is
    -p (log p + entropy). The target's element of dlogits is kept apart, see `TargetGradient`.

    Args:
        logits_RV: (R, V) float32, x without its bias; destroyed.
        dlogits_RV: (R, V) to write, in the operands' dtype, without `target_grad_R`; may be
            `logits_RV`. None: no gradient.
        target_grad_R: (R,) float32 to write, to be added to dlogits at the target; None where
            dlogits_RV is.
        bias_V: (V,) float32 or None.
        target_R: (R,) int64 in [0, V).
        weight_R: (R,) float32. A row of weight 0 gets a gradient of 0 and a log-prob of NaN.
        logprob_R: (R,) float32 to write.
        transform: the constants of z.
        entropy_R: (R,) float32 to write, or None.
        entropy_weight_R: (R,) float32, what multiplies the entropy's gradient in dlogits, or None;
            only with entropy_R. A row is of weight 0 if all of its weights are.
        top1_R: (R,) float32 to write, or None: 1 where no token is likelier than the target, or 0.
        policy: None, or what turns weight_R into the row's coefficient by its log-prob.
    """
    for rows in _blocks(logits_RV):
        _block_rows(
            logits_RV[rows],
            None if dlogits_RV is None else dlogits_RV[rows],
            None if target_grad_R is None else target_grad_R[rows],
            bias_V,
            target_R[rows],
            weight_R[rows],
            logprob_R[rows],
            transform,
            None if entropy_R is None else entropy_R[rows],
            None if entropy_weight_R is None else entropy_weight_R[rows],
            None if top1_R is None else top1_R[rows],
            None if policy is None else policy.rows(rows.start, rows.stop),
        )


def _block_rows(
    z_BV: Tensor,
    dlogits_BV: Tensor | None,
    target_grad_B: Tensor | None,
    bias_V: Tensor | None,
    target_B: Tensor,
    weight_B: Tensor,
    logprob_B: Tensor,
    transform: LogitTransform,
    entropy_B: Tensor | None,
    entropy_weight_B: Tensor | None,
    top1_B: Tensor | None,
    policy: Policy | None,
) -> None:
    bend_BV = _transform_logits_(z_BV, bias_V, transform, dlogits_BV is not None)
    statistics, gap_BV = _statistics_(z_BV, target_B, entropy_B is not None)
    outcome = row_outcome(statistics, entropy_B is not None, top1_B is not None)
    if dlogits_BV is not None and target_grad_B is not None:
        factors, target = row_factors(
            statistics, outcome.logprob_R, weight_B, entropy_weight_B, policy, transform
        )
        target_grad_B.copy_(target.grad_R)
        target_exp_B = (statistics.target_z_R - statistics.peak_R).exp()
        _put_(z_BV, target_B, target_exp_B.where(~target.whole_R, 0))
        gap_BV = None if entropy_weight_B is None else gap_BV
        _gradient_(z_BV, gap_BV, bend_BV, factors, transform.slope)
        if dlogits_BV.data_ptr() != z_BV.data_ptr():
            dlogits_BV.copy_(z_BV)
    mark_dead(outcome, weight_B, entropy_weight_B, policy)
    store(outcome, logprob_B, entropy_B, top1_B)


def row_statistics(
    logits_RV: Tensor,
    bias_V: Tensor | None,
    target_R: Tensor,
    transform: LogitTransform,
    entropy: bool,
) -> Statistics:
    """The sums over a part of the vocabulary; logits are left as they are.

    Args:
        target_R: (R,) int64 in [0, V), or below 0 where the target is in another part.
        entropy: whether to make what the entropy needs.
    """
    blocks = []
    for rows in _blocks(logits_RV):
        z_BV = logits_RV[rows].clone()
        _transform_logits_(z_BV, bias_V, transform, False)
        blocks.append(_statistics_(z_BV, target_R[rows], entropy)[0])
    return Statistics(*(torch.cat(each) for each in zip(*blocks, strict=True)))


def row_gradient(
    logits_RV: Tensor,
    dlogits_RV: Tensor,
    bias_V: Tensor | None,
    zero_R: Tensor,
    factors: Factors,
    transform: LogitTransform,
) -> None:
    """The gradient in a part of the vocabulary, by the sums over the whole; destroys logits.

    zero_R: (R,) int64, the column in which dlogits is to be 0: that of a target in this part whose
        gradient is whole without it. Below 0: none.
    """
    for rows in _blocks(logits_RV):
        z_BV = logits_RV[rows]
        bend_BV = _transform_logits_(z_BV, bias_V, transform, True)
        block = Factors(*(None if each is None else each[rows] for each in factors))
        gap_BV = _exponentials_(z_BV, block.peak_R, block.pull_R is not None)
        _put_(z_BV, zero_R[rows], torch.zeros_like(block.peak_R))
        _gradient_(z_BV, gap_BV, bend_BV, block, transform.slope)
        if dlogits_RV.data_ptr() != logits_RV.data_ptr():
            dlogits_RV[rows] = z_BV


def _blocks(logits_RV: Tensor) -> Iterator[slice]:
    """All rows: on the CPU in blocks, elsewhere at once."""
    R, V = logits_RV.shape
    on_cpu = logits_RV.device.type == "cpu"
    block = max(1, _CPU_BLOCK_BYTES // (4 * V)) if on_cpu else max(1, R)
    for start in range(0, R, block):
        yield slice(start, min(start + block, R))


def _statistics_(z_BV: Tensor, target_B: Tensor, entropy: bool) -> tuple[Statistics, Tensor | None]:
    """z becomes exp(z - max z), with 0 at the target; gap = z - max z, for the entropy."""
    # A part of the vocabulary may be masked whole; -inf - -inf would be NaN.
    peak_B = z_BV.amax(1).clamp_(min=torch.finfo(z_BV.dtype).min)
    target_z_B = _at(z_BV, target_B).where(target_B >= 0, -torch.inf)
    gap_BV = _exponentials_(z_BV, peak_B, entropy)
    rest_B = ties_B = spread_B = peak_B
    if gap_BV is not None:
        peaks_BV = z_BV == 1
        rest_B, ties_B = z_BV.masked_fill(peaks_BV, 0).sum(1), peaks_BV.sum(1).to(peak_B.dtype)
        spread_B = (z_BV * gap_BV).sum(1)
    others_B = _put_(z_BV, target_B, torch.zeros_like(peak_B)).sum(1)
    return Statistics(peak_B, target_z_B, others_B, rest_B, ties_B, spread_B), gap_BV


def _exponentials_(z_BV: Tensor, peak_B: Tensor, keep_gap: bool) -> Tensor | None:
    """z becomes exp(z - peak); returns z - peak where it is to be kept."""
    z_BV.sub_(peak_B[:, None])
    gap_BV = z_BV.clamp(min=_GAP_FLOOR) if keep_gap else None
    z_BV.exp_()
    return gap_BV


def _gradient_(
    exp_BV: Tensor,
    gap_BV: Tensor | None,
    bend_BV: Tensor | None,
    factors: Factors,
    slope: float,
) -> None:
    """exp(z - peak) becomes dlogits, and 0 stays 0; see Factors."""
    if gap_BV is not None and factors.pull_R is not None and factors.mean_gap_R is not None:
        gap_BV.sub_(factors.mean_gap_R[:, None]).mul_(exp_BV)
        gap_BV.mul_((factors.pull_R * slope)[:, None])
    exp_BV.mul_((factors.scale_R * slope)[:, None])
    if gap_BV is not None:
        exp_BV.sub_(gap_BV)
    if bend_BV is not None:
        exp_BV.mul_(bend_BV)


def _at(values_BV: Tensor, target_B: Tensor) -> Tensor:
    """The target's value; any where the target is in another part of the vocabulary."""
    return values_BV.gather(1, target_B.clamp(min=0)[:, None])[:, 0]


def _put_(values_BV: Tensor, target_B: Tensor, value_B: Tensor) -> Tensor:
    """Set the target's value, where the target is in this part of the vocabulary."""
    value_B = value_B.where(target_B >= 0, _at(values_BV, target_B))
    return values_BV.scatter_(1, target_B.clamp(min=0)[:, None], value_B[:, None])


def _transform_logits_(
    x_BV: Tensor, bias_V: Tensor | None, transform: LogitTransform, keep_bend: bool
) -> Tensor | None:
    """x -> z in place; returns (dz/dx) / slope where that is not 1 throughout."""
    if bias_V is not None:
        x_BV.add_(bias_V)
    if transform.cap is None:
        if transform.slope != 1.0:
            x_BV.mul_(transform.slope)
        return None
    x_BV.mul_(transform.inner).tanh_()
    bend_BV = torch.addcmul(x_BV.new_ones(()), x_BV, x_BV, value=-1) if keep_bend else None
    x_BV.mul_(transform.cap)
    return bend_BV
