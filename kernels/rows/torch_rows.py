"""The row functions in PyTorch, for the CPU and for any device without Triton.

The arithmetic is that of `triton_kernels.py`. A slab of logits exceeds a CPU's cache, so rows are
processed in blocks that fit: memory is read and written once, each exponential is taken once, and
no buffer of the slab's size is allocated.

Shapes: R rows of a slab, B of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .contract import LogitConstants, RowInputs, RowOutputs
from .statistics import Factors, Statistics, row_factors, row_outcome, store

# Bytes of a block's logits, which stay in the last-level cache over the five passes. Blocks of
# 1 MiB, for a core's own cache, gain nothing (the passes take 1.3 ns a logit, the GEMMs 41) and
# make threads synchronise eight times as often, which is slow on a busy machine.
_CPU_BLOCK_BYTES = 8 * 2**20

# The least z - max that is multiplied by its exponential, which is 0 there: 0 * -inf is NaN.
_GAP_FLOOR = -128.0


def policy_rows(
    logits_RV: Tensor,
    dlogits_RV: Tensor | None,
    bias_V: Tensor | None,
    inputs: RowInputs,
    outputs: RowOutputs,
    constants: LogitConstants,
) -> None:
    """logprob = log softmax(z)[target] and dlogits = weight (softmax(z) - onehot) dz/dx.

    A form replaces the weight by the row's coefficient, see `forms.py`. On request, also
    entropy = -sum p log p with p = softmax(z), whose gradient in z is -p (log p + entropy), and
    top1 = 1 where no token is likelier than the target, else 0. The target's element of dlogits
    is kept apart, see `TargetGradient`.

    Args:
        logits_RV: (R, V) float32, x without its bias; destroyed.
        dlogits_RV: (R, V) to write, in the operands' dtype, without `target_grad_R`; may be
            `logits_RV`. None: no gradient.
        bias_V: (V,) float32 or None.
        inputs: targets in [0, V). A dead row gets a gradient of 0 and NaN for all else. An entropy
            weight multiplies the entropy's gradient in dlogits, and needs `outputs.entropy_R`.
        outputs: what to write.
        constants: the constants of z.
    """
    for rows in _blocks(logits_RV):
        _block_rows(
            logits_RV[rows],
            None if dlogits_RV is None else dlogits_RV[rows],
            bias_V,
            inputs.rows(rows.start, rows.stop),
            outputs.rows(rows.start, rows.stop),
            constants,
        )


def _block_rows(
    z_BV: Tensor,
    dlogits_BV: Tensor | None,
    bias_V: Tensor | None,
    inputs: RowInputs,
    outputs: RowOutputs,
    constants: LogitConstants,
) -> None:
    entropy = outputs.entropy_R is not None
    bend_BV = _transform_logits_(z_BV, bias_V, constants, dlogits_BV is not None)
    pulls = inputs.entropy_weight_R is not None
    statistics, gap_BV = _statistics_(z_BV, inputs.target_R, entropy, keep_gap=pulls)
    outcome = row_outcome(statistics, entropy, outputs.top1_R is not None)
    if dlogits_BV is not None and outputs.target_grad_R is not None:
        factors, target = row_factors(statistics, outcome.logprob_R, inputs, constants)
        outputs.target_grad_R.copy_(target.grad_R)
        target_exp_B = (statistics.target_z_R - statistics.peak_R).exp()
        _put_(z_BV, inputs.target_R, target_exp_B.where(~target.whole_R, 0))
        _gradient_(z_BV, gap_BV, bend_BV, factors, constants.slope)
        if dlogits_BV.data_ptr() != z_BV.data_ptr():
            dlogits_BV.copy_(z_BV)
    store(outcome, inputs, outputs)


def row_statistics(
    logits_RV: Tensor,
    bias_V: Tensor | None,
    target_R: Tensor,
    constants: LogitConstants,
    entropy: bool,
) -> Statistics:
    """The sums over a shard of the vocabulary; logits are left as they are.

    Args:
        target_R: (R,) int64 in [0, V), or negative where the target is in another shard.
        entropy: whether to compute the sums that the entropy needs.
    """
    blocks = []
    for rows in _blocks(logits_RV):
        z_BV = logits_RV[rows].clone()
        _transform_logits_(z_BV, bias_V, constants, False)
        blocks.append(_statistics_(z_BV, target_R[rows], entropy, keep_gap=False)[0])
    return Statistics(*(torch.cat(each) for each in zip(*blocks, strict=True)))


def row_gradient(
    logits_RV: Tensor,
    dlogits_RV: Tensor,
    bias_V: Tensor | None,
    zero_R: Tensor,
    factors: Factors,
    constants: LogitConstants,
) -> None:
    """Write a shard's gradient, given the sums over the whole vocabulary; destroys logits.

    zero_R: (R,) int64, the column where dlogits is 0: that of a target in this shard whose
        gradient is whole in `target_grad_R`. Negative: none.
    """
    for rows in _blocks(logits_RV):
        z_BV = logits_RV[rows]
        bend_BV = _transform_logits_(z_BV, bias_V, constants, True)
        block = Factors(*(None if each is None else each[rows] for each in factors))
        gap_BV = _exponentials_(z_BV, block.peak_R, block.pull_R is not None)
        _put_(z_BV, zero_R[rows], torch.zeros_like(block.peak_R))
        _gradient_(z_BV, gap_BV, bend_BV, block, constants.slope)
        if dlogits_RV.data_ptr() != logits_RV.data_ptr():
            dlogits_RV[rows] = z_BV


def _blocks(logits_RV: Tensor) -> Iterator[slice]:
    """All rows, in blocks on a CPU and at once elsewhere."""
    R, V = logits_RV.shape
    on_cpu = logits_RV.device.type == "cpu"
    block = max(1, _CPU_BLOCK_BYTES // (4 * V)) if on_cpu else max(1, R)
    for start in range(0, R, block):
        yield slice(start, min(start + block, R))


def _statistics_(
    z_BV: Tensor, target_B: Tensor, entropy: bool, *, keep_gap: bool
) -> tuple[Statistics, Tensor | None]:
    """Statistics, and z - max z if `keep_gap`; z becomes exp(z - max z), 0 at the target.

    The entropy's sums share one buffer, by operations that PyTorch vectorises: a mask of the peaks
    would take four times as long.
    """
    # A shard may be masked completely; -inf - -inf is NaN.
    peak_B = z_BV.amax(1).clamp_(min=torch.finfo(z_BV.dtype).min)
    target_z_B = _at(z_BV, target_B).where(target_B >= 0, -torch.inf)
    gap_BV = _exponentials_(z_BV, peak_B, entropy)
    rest_B = ties_B = spread_B = peak_B
    if gap_BV is not None:
        buffer_BV = z_BV * gap_BV if keep_gap else gap_BV.mul_(z_BV)
        spread_B = buffer_BV.sum(1)
        rest_B = torch.frac(z_BV, out=buffer_BV).sum(1)  # the peaks are 1, all others are below
    others_B = _put_(z_BV, target_B, torch.zeros_like(peak_B)).sum(1)
    if entropy:
        ties_B = (others_B + (target_z_B - peak_B).exp() - rest_B).round()
    statistics = Statistics(peak_B, target_z_B, others_B, rest_B, ties_B, spread_B)
    return statistics, gap_BV if keep_gap else None


def _exponentials_(z_BV: Tensor, peak_B: Tensor, keep_gap: bool) -> Tensor | None:
    """z - peak if `keep_gap`; z becomes exp(z - peak)."""
    if not keep_gap:
        z_BV.sub_(peak_B[:, None]).exp_()
        return None
    gap_BV = torch.sub(z_BV, peak_B[:, None]).clamp_(min=_GAP_FLOOR)
    torch.exp(gap_BV, out=z_BV)
    return gap_BV


def _gradient_(
    exp_BV: Tensor,
    gap_BV: Tensor | None,
    bend_BV: Tensor | None,
    factors: Factors,
    slope: float,
) -> None:
    """Turn exp(z - peak) into dlogits, see Factors; 0 stays 0."""
    if gap_BV is not None and factors.pull_R is not None and factors.mean_gap_R is not None:
        gap_BV.sub_(factors.mean_gap_R[:, None]).mul_(exp_BV)
        gap_BV.mul_((factors.pull_R * slope)[:, None])
    exp_BV.mul_((factors.scale_R * slope)[:, None])
    if gap_BV is not None:
        exp_BV.sub_(gap_BV)
    if bend_BV is not None:
        exp_BV.mul_(bend_BV)


def _at(values_BV: Tensor, target_B: Tensor) -> Tensor:
    """The target's value; arbitrary where the target is in another shard."""
    return values_BV.gather(1, target_B.clamp(min=0)[:, None])[:, 0]


def _put_(values_BV: Tensor, target_B: Tensor, value_B: Tensor) -> Tensor:
    """Set the target's value, where the target is in this shard."""
    value_B = value_B.where(target_B >= 0, _at(values_BV, target_B))
    return values_BV.scatter_(1, target_B.clamp(min=0)[:, None], value_B[:, None])


def _transform_logits_(
    x_BV: Tensor, bias_V: Tensor | None, constants: LogitConstants, keep_bend: bool
) -> Tensor | None:
    """(dz/dx) / slope, or None where that is 1 throughout; x becomes z."""
    if bias_V is not None:
        x_BV.add_(bias_V)
    if constants.cap is None:
        if constants.slope != 1.0:
            x_BV.mul_(constants.slope)
        return None
    x_BV.mul_(constants.inner).tanh_()
    bend_BV = torch.addcmul(x_BV.new_ones(()), x_BV, x_BV, value=-1) if keep_bend else None
    x_BV.mul_(constants.cap)
    return bend_BV
