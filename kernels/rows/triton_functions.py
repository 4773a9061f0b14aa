"""Arithmetic shared by the row kernels, as Triton device functions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """tanh(x) and its derivative, to float32 precision near 0 and far from it."""
    decay = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0, decay - 1.0, 1.0 - decay) / (1.0 + decay)
    # 1 - exp cancels near 0; four terms of the series leave 1e-9 of x below 0.1.
    x2 = x * x
    near = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 - x2 * (17.0 / 315))))
    value = tl.where(x2 < 0.01, near, far)
    return value, 4.0 * decay / ((1.0 + decay) * (1.0 + decay))


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], to float32 precision of x."""
    series = x * (1 - x * (1.0 / 2 - x * (1.0 / 3 - x * (1.0 / 4 - x * (1.0 / 5 - x / 6)))))
    return tl.where(x < 0.05, series, tl.log(1.0 + x))


@triton.jit
def _transform(x, slope, inner, cap, HAS_CAP: tl.constexpr):
    """z and dz/dx of a logit x, bias included; see LogitConstants."""
    if HAS_CAP:
        value, derivative = _tanh(x * inner)
        z = value * cap
        dz = derivative * slope
    else:
        z = x * slope
        dz = slope
    return z, dz


@triton.jit
def _load_logits(logits_ptr, bias_ptr, columns, row_stride, HAS_BIAS: tl.constexpr):
    x = tl.load(logits_ptr + columns, mask=columns < row_stride, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=columns < row_stride, other=0.0)
    return x


@triton.jit
def _online_softmax(peak, others, z, counts):
    """Running maximum, and sum of exp(z - maximum) where `counts`, after one more block of z."""
    new_peak = tl.maximum(peak, tl.max(z, 0))
    # While all logits so far are -inf, any finite base keeps the sum at 0.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    block = tl.sum(tl.where(counts, tl.exp(z - base), 0.0), 0)
    return new_peak, others * tl.exp(peak - base) + block


@triton.jit
def _target_logit(
    logits_ptr, bias_ptr, target, row_stride, slope, inner, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """z and dz/dx of one column."""
    x = _load_logits(logits_ptr, bias_ptr, target, row_stride, HAS_BIAS)
    return _transform(x, slope, inner, cap, HAS_CAP)


@triton.jit
def _add_block(
    peak, others, rest, ties, spread, x, columns, target, V, slope, inner, cap,
    HAS_CAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """A row's running statistics (see Statistics) after one more block of its logits."""
    z, _dz = _transform(x, slope, inner, cap, HAS_CAP)
    z = tl.where(columns < V, z, float("-inf"))
    if HAS_ENTROPY:
        rest, ties, spread = _online_entropy(peak, rest, ties, spread, z)
    peak, others = _online_softmax(peak, others, z, columns != target)
    return peak, others, rest, ties, spread


@triton.jit
def _pulled(z, dz, peak, pull, mean_gap):
    """The entropy's part of a gradient."""
    gap = _gap(z, peak)  # log p + entropy = gap - E[gap]
    return pull * tl.exp(gap) * (gap - mean_gap) * dz


@triton.jit
def _target_gradient(
    z, dz, peak, others, weight, scale, pull, mean_gap, whole, HAS_PULL: tl.constexpr
):  # fmt: skip
    """See TargetGradient."""
    gradient = -scale * others * dz
    if HAS_PULL:
        gradient -= _pulled(z, dz, peak, pull, mean_gap)
    return tl.where(whole, gradient, -weight * dz)


@triton.jit
def _store_gradient(
    dlogits_ptr, x, columns, zero, V, row_stride, peak, scale, pull, mean_gap, slope, inner, cap,
    HAS_CAP: tl.constexpr, HAS_PULL: tl.constexpr,
):  # fmt: skip
    """Store a block of the gradient, rounded once; 0 in column `zero` and from V on."""
    z, dz = _transform(x, slope, inner, cap, HAS_CAP)
    dlogits = scale * tl.exp(z - peak) * dz
    if HAS_PULL:
        dlogits -= _pulled(z, dz, peak, pull, mean_gap)
    dlogits = tl.where((columns == zero) | (columns >= V), 0.0, dlogits)
    dlogits = dlogits.to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + columns, dlogits, mask=columns < row_stride)


@triton.jit
def _gap(z, peak):
    """z - peak, clamped where its exponential is 0 anyway, since 0 * -inf is NaN."""
    return tl.maximum(z - peak, -128.0)


@triton.jit
def _online_entropy(peak, rest, ties, spread, z):
    """rest, ties and spread (see Statistics) after one more block of z.

    `peak` is the maximum of the blocks before this one.
    """
    new_peak = tl.maximum(peak, tl.max(z, 0))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    rise = tl.where(peak == float("-inf"), 0.0, base - peak)
    decay = tl.exp(peak - base)
    gap = _gap(z, base)
    spread = (spread - rise * (rest + ties)) * decay + tl.sum(tl.exp(gap) * gap, 0)
    moved = new_peak > peak
    rest = tl.where(moved, (rest + ties) * decay, rest)
    ties = tl.where(moved, 0.0, ties)
    rest += tl.sum(tl.where(z == base, 0.0, tl.exp(gap)), 0)
    ties += tl.sum(tl.where(z == base, 1.0, 0.0), 0)
    return rest, ties, spread


@triton.jit
def _entropy(rest, ties, spread):
    """-sum p log p = log(total) - E[gap], and E[gap].

    The peaks stay out of the sum, so that the log of a total near 1 keeps full precision.
    """
    total = rest + ties
    one_peak = (ties == 1.0) & (rest < 1.0)
    log_total = tl.where(one_peak, _log1p(tl.where(one_peak, rest, 0.0)), tl.log(total))
    return log_total - spread / total, spread / total


@triton.jit
def _load_if(pointer, row, IS_THERE: tl.constexpr):
    value = 0.0
    if IS_THERE:
        value = tl.load(pointer + row)
    return value


@triton.jit
def _store_if(pointer, row, value, IS_THERE: tl.constexpr):
    if IS_THERE:
        tl.store(pointer + row, value)


@triton.jit
def _store_dead_row(
    dlogits_ptr, V, row_stride, lanes, WRITE_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    if WRITE_GRADIENT:
        for start in range(0, V, BLOCK):
            columns = start + lanes
            zeros = tl.zeros((BLOCK,), dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + columns, zeros, mask=columns < row_stride)


@triton.jit
def _target_logprob(target_z, others):
    """log of p = e / (e + others) with e = exp(target_z), and e + others.

    The target stays out of `others`, so that 1 - p = others / total keeps full precision for a
    nearly certain target, where p - 1 would cancel.
    """
    target_exp = tl.exp(target_z)
    total = target_exp + others
    # Elsewhere (z - max) - log(sum), not z - lse: with logits of 1e4, lse is off by 1e-3.
    certain = others < target_exp
    ratio = tl.where(certain, others / target_exp, 1.0)
    return tl.where(certain, -_log1p(ratio), target_z - tl.log(total)), total
