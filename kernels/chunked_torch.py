"""The row function in PyTorch, for the CPU and for any device without Triton.

It is the arithmetic of `rowwise.py`. On the CPU a slab of logits does not fit in the cache, so it
is worked through in blocks of rows that do: memory is read and written once, the exponential is
taken once, and nothing the size of the slab is allocated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import LogitTransform
from .policy import Policy, row_coefficient

# Logits of one block: they stay in the last-level cache over the five passes. At 1 MiB they would
# stay in a core's own cache, which gains nothing here (the passes take 1.3 ns a logit, the GEMMs
# 41), and threads would have to meet eight times as often, which costs dear on a busy machine.
_CPU_BLOCK_BYTES = 8 * 2**20

# Of z - max where it is multiplied by its exponential, which is 0 there: 0 * -inf would be NaN.
GAP_FLOOR = -128.0


def weighted_ce_rows(
    logits_RV: Tensor,
    dlogits_RV: Tensor | None,
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
    -p (log p + entropy).

    Args:
        logits_RV: (R, V) float32, x without its bias; destroyed.
        dlogits_RV: (R, V) to write, in the operands' dtype; may be `logits_RV`. None: no gradient.
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
    R, V = logits_RV.shape
    on_cpu = logits_RV.device.type == "cpu"
    block = max(1, _CPU_BLOCK_BYTES // (4 * V)) if on_cpu else R
    for start in range(0, R, block):
        rows = slice(start, start + block)
        _block_rows(
            logits_RV[rows],
            None if dlogits_RV is None else dlogits_RV[rows],
            bias_V,
            target_R[rows, None],
            weight_R[rows, None],
            logprob_R[rows, None],
            transform,
            None if entropy_R is None else entropy_R[rows, None],
            None if entropy_weight_R is None else entropy_weight_R[rows, None],
            None if top1_R is None else top1_R[rows, None],
            None if policy is None else policy.rows(start, start + block),
        )
    dead_R = weight_R == 0
    if entropy_weight_R is not None:
        dead_R &= entropy_weight_R == 0
    if policy is not None:
        dead_R &= policy.kl_coef_R == 0
    for values_R in (logprob_R, entropy_R, top1_R):
        if values_R is not None:
            values_R.masked_fill_(dead_R, torch.nan)


def _block_rows(
    z_BV: Tensor,
    dlogits_BV: Tensor | None,
    bias_V: Tensor | None,
    target_B1: Tensor,
    weight_B1: Tensor,
    logprob_B1: Tensor,
    transform: LogitTransform,
    entropy_B1: Tensor | None,
    entropy_weight_B1: Tensor | None,
    top1_B1: Tensor | None,
    policy: Policy | None,
) -> None:
    bend_BV = _transform_logits_(z_BV, bias_V, transform, dlogits_BV is not None)
    peak_B1 = z_BV.amax(1, keepdim=True)
    target_z_B1 = z_BV.gather(1, target_B1).sub_(peak_B1)
    z_BV.sub_(peak_B1)
    gap_BV = None if entropy_B1 is None else z_BV.clamp(min=GAP_FLOOR)
    z_BV.exp_()
    if gap_BV is not None and entropy_B1 is not None:
        _entropy_(gap_BV, z_BV, entropy_B1)
    # The target stays out of the sum: 1 - p of a target that is nearly certain is then others /
    # total with all its digits, where p - 1 would have few left.
    target_exp_B1 = target_z_B1.exp()
    others_B1 = z_BV.scatter_(1, target_B1, 0).sum(1, keepdim=True)
    total_B1 = target_exp_B1 + others_B1
    # (z - max) - log(sum), not z - lse: with logits of 1e4 a float32 lse is off by 1e-3.
    logprob_B1.copy_(
        torch.where(
            others_B1 < target_exp_B1,
            -torch.log1p(others_B1 / target_exp_B1),
            target_z_B1 - total_B1.log(),
        )
    )
    if top1_B1 is not None:
        top1_B1.copy_(target_z_B1 == 0)
    if dlogits_BV is None:
        return
    if policy is not None:
        weight_B1 = row_coefficient(weight_B1[:, 0], logprob_B1[:, 0], policy)[:, None]
    scale_B1 = weight_B1 * transform.slope / total_B1
    z_BV.mul_(scale_B1).scatter_(1, target_B1, -scale_B1 * others_B1)
    if gap_BV is not None and entropy_weight_B1 is not None:
        z_BV.addcmul_(gap_BV, entropy_weight_B1, value=-transform.slope)
    if bend_BV is not None:
        z_BV.mul_(bend_BV)
    if dlogits_BV.data_ptr() != z_BV.data_ptr():
        dlogits_BV.copy_(z_BV)


def _entropy_(gap_BV: Tensor, exp_BV: Tensor, entropy_B1: Tensor) -> None:
    """entropy = log(total) - E[gap], gap = z - max; gap becomes p (gap - E[gap]).

    That is p (log p + entropy). The peaks stay out of the sum, so that the log of a total that is
    nearly 1 has all its digits.
    """
    peaks_BV = exp_BV == 1
    ties_B1 = peaks_BV.sum(1, keepdim=True)
    rest_B1 = exp_BV.masked_fill(peaks_BV, 0).sum(1, keepdim=True)
    total_B1 = rest_B1 + ties_B1
    mean_B1 = (exp_BV * gap_BV).sum(1, keepdim=True).div_(total_B1)
    log_total_B1 = torch.where(ties_B1 == 1, rest_B1.log1p(), total_B1.log())
    entropy_B1.copy_(log_total_B1 - mean_B1)
    gap_BV.sub_(mean_B1).mul_(exp_BV).div_(total_B1)


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
