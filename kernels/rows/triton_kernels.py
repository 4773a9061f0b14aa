"""The row kernels, from a row of logits to its log-prob and gradient; see `triton_rows.py`.

    _policy_rows_kernel       everything in one launch
    _row_statistics_kernel    the sums over one shard of the vocabulary
    _row_gradient_kernel      a shard's gradient, given the sums over the whole vocabulary

The rows of a slab have V columns and lie `row_stride` elements apart, a multiple of 16. The padding
columns from V to the stride belong to the slab, and the bias is padded likewise, so that every
access is 16 bytes wide whatever V is. Padding is read and ignored; a gradient's padding becomes 0.

Shapes: R rows of a slab, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import statistics as row_statistics
from .triton_forms import _form_coefficient
from .triton_functions import (
    _add_block,
    _entropy,
    _load_if,
    _load_logits,
    _store_dead_row,
    _store_gradient,
    _store_if,
    _target_gradient,
    _target_logit,
    _target_logprob,
)

APART_FROM = tl.constexpr(row_statistics.APART_FROM)

# Per-row scalars start at any offset in a chunk; specialising on their alignment would only compile
# the same code twice.
_SCALARS = [
    "target_grad_ptr",
    "target_ptr",
    "weight_ptr",
    "logprob_ptr",
    "entropy_ptr",
    "entropy_weight_ptr",
    "top1_ptr",
    "row_constants_ptr",
    "kl_coef_ptr",
]


@triton.jit(do_not_specialize_on_alignment=_SCALARS, do_not_specialize=["constants_stride"])
def _policy_rows_kernel(
    logits_ptr,  # (R, row_stride) float32
    dlogits_ptr,  # (R, row_stride) of the operands' dtype; may be logits_ptr
    target_grad_ptr,  # (R,) float32
    bias_ptr,  # (row_stride,) float32
    target_ptr,  # (R,) int64
    weight_ptr,  # (R,) float32
    logprob_ptr,  # (R,) float32
    entropy_ptr,  # (R,) float32
    entropy_weight_ptr,  # (R,) float32
    top1_ptr,  # (R,) float32
    row_constants_ptr,  # (P, constants_stride) float32, see FormRows
    kl_coef_ptr,  # (R,) float32
    constants_stride,
    row_stride,
    V,
    slope,
    inner,
    cap,
    low,
    high,
    importance_cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_ENTROPY_WEIGHT: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    RATIO: tl.constexpr,
    SHAPING: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
    ROW_FITS: tl.constexpr,  # V <= BLOCK
    BLOCK: tl.constexpr,
):
    """logprob = z[target] - log sum exp z; dlogits = weight (softmax(z) - onehot) dz/dx.

    entropy = -sum p log p, whose gradient adds -entropy_weight p (log p + entropy) dz/dx to
    dlogits. `target_grad` is to be added to dlogits at the target, see TargetGradient.
    One program a row; it writes the gradient once. A row that fits a block is read once and stays
    in registers: 6 bytes a logit for 16-bit operands, 8 for float32. A longer row is read twice:
    10 and 12 bytes. A dead row is not read.
    """
    row = tl.program_id(0).to(tl.int64)  # R * row_stride passes 2^31
    logits_ptr += row * row_stride
    dlogits_ptr += row * row_stride
    lanes = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + row)
    pull = _load_if(entropy_weight_ptr, row, HAS_ENTROPY_WEIGHT)
    kl_coef = _load_if(kl_coef_ptr, row, RATIO != 0)

    if (weight == 0.0) & (pull == 0.0) & (kl_coef == 0.0):
        tl.store(logprob_ptr + row, float("nan"))
        _store_if(entropy_ptr, row, float("nan"), HAS_ENTROPY)
        _store_if(top1_ptr, row, float("nan"), HAS_TOP1)
        _store_if(target_grad_ptr, row, 0.0, WRITE_GRADIENT)
        _store_dead_row(dlogits_ptr, V, row_stride, lanes, WRITE_GRADIENT, BLOCK)
    else:
        # Read before anything is written, as the gradient may overwrite the logits.
        target = tl.load(target_ptr + row).to(tl.int32)  # the columns' type
        target_z, target_dz = _target_logit(
            logits_ptr, bias_ptr, target, row_stride, slope, inner, cap, HAS_BIAS, HAS_CAP
        )
        peak, others, rest, ties, spread = float("-inf"), 0.0, 0.0, 0.0, 0.0
        if ROW_FITS:
            row_x = _load_logits(logits_ptr, bias_ptr, lanes, row_stride, HAS_BIAS)
            peak, others, rest, ties, spread = _add_block(
                peak, others, rest, ties, spread, row_x, lanes, target, V, slope, inner, cap,
                HAS_CAP, HAS_ENTROPY,
            )  # fmt: skip
        else:
            for start in range(0, V, BLOCK):
                columns = start + lanes
                x = _load_logits(logits_ptr, bias_ptr, columns, row_stride, HAS_BIAS)
                peak, others, rest, ties, spread = _add_block(
                    peak, others, rest, ties, spread, x, columns, target, V, slope, inner, cap,
                    HAS_CAP, HAS_ENTROPY,
                )  # fmt: skip

        logprob, total = _target_logprob(target_z - peak, others)
        tl.store(logprob_ptr + row, logprob)
        mean_gap = 0.0
        if HAS_ENTROPY:
            entropy, mean_gap = _entropy(rest, ties, spread)
            tl.store(entropy_ptr + row, entropy)
        _store_if(top1_ptr, row, tl.where(target_z == peak, 1.0, 0.0), HAS_TOP1)
        weight = _form_coefficient(
            weight, kl_coef, logprob, row_constants_ptr + row, constants_stride, low, high,
            importance_cap, RATIO, SHAPING, KL_TIMES_RATIO,
        )  # fmt: skip

        if WRITE_GRADIENT:
            scale, pull = weight / total, pull / total
            # The constant on the right: on the left, the interpreter of Triton 3.8 fails.
            whole = others < tl.exp(target_z - peak) * APART_FROM
            target_grad = _target_gradient(
                target_z, target_dz, peak, others, weight, scale, pull, mean_gap, whole,
                HAS_ENTROPY_WEIGHT,
            )  # fmt: skip
            tl.store(target_grad_ptr + row, target_grad)
            zero = tl.where(whole, target, -1)
            if ROW_FITS:
                _store_gradient(
                    dlogits_ptr, row_x, lanes, zero, V, row_stride, peak, scale, pull,
                    mean_gap, slope, inner, cap, HAS_CAP, HAS_ENTROPY_WEIGHT,
                )  # fmt: skip
            else:
                last = (V - 1) // BLOCK * BLOCK
                for start in range(0, V, BLOCK):
                    # Backwards, since the L2 still holds what was read last.
                    columns = last - start + lanes
                    x = _load_logits(logits_ptr, bias_ptr, columns, row_stride, HAS_BIAS)
                    _store_gradient(
                        dlogits_ptr, x, columns, zero, V, row_stride, peak, scale, pull,
                        mean_gap, slope, inner, cap, HAS_CAP, HAS_ENTROPY_WEIGHT,
                    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["target_ptr", "statistics_ptr"])
def _row_statistics_kernel(
    logits_ptr,  # (R, row_stride) float32
    bias_ptr,  # (row_stride,) float32
    target_ptr,  # (R,) int64; negative where the target is in another shard
    statistics_ptr,  # (6, R) float32: see Statistics
    R,
    row_stride,
    V,
    slope,
    inner,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """max z, z[target] and sums of exp(z - max) over this shard of the vocabulary.

    One program a row; it reads 4 bytes a logit.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    lanes = tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row).to(tl.int32)
    target_z, _dz = _target_logit(
        logits_ptr, bias_ptr, tl.maximum(target, 0), row_stride, slope, inner, cap,
        HAS_BIAS, HAS_CAP,
    )  # fmt: skip
    peak, others, rest, ties, spread = float("-inf"), 0.0, 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK):
        columns = start + lanes
        x = _load_logits(logits_ptr, bias_ptr, columns, row_stride, HAS_BIAS)
        peak, others, rest, ties, spread = _add_block(
            peak, others, rest, ties, spread, x, columns, target, V, slope, inner, cap,
            HAS_CAP, HAS_ENTROPY,
        )  # fmt: skip
    statistics_ptr += row
    tl.store(statistics_ptr, peak)
    tl.store(statistics_ptr + R, tl.where(target >= 0, target_z, float("-inf")))
    tl.store(statistics_ptr + 2 * R, others)
    tl.store(statistics_ptr + 3 * R, rest)
    tl.store(statistics_ptr + 4 * R, ties)
    tl.store(statistics_ptr + 5 * R, spread)


@triton.jit(do_not_specialize_on_alignment=["zero_ptr", "factors_ptr"])
def _row_gradient_kernel(
    logits_ptr,  # (R, row_stride) float32
    dlogits_ptr,  # (R, row_stride) of the operands' dtype; may be logits_ptr
    bias_ptr,  # (row_stride,) float32
    zero_ptr,  # (R,) int64, the column to be 0; negative: none
    factors_ptr,  # (4, R) float32: see Factors
    R,
    row_stride,
    V,
    slope,
    inner,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_PULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dlogits over this shard of the vocabulary, as in Factors, and 0 in one column.

    One program a row; it moves 6 bytes a logit for 16-bit operands, 8 for float32.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    dlogits_ptr += row * row_stride
    factors_ptr += row
    lanes = tl.arange(0, BLOCK)
    zero = tl.load(zero_ptr + row).to(tl.int32)
    peak, scale = tl.load(factors_ptr), tl.load(factors_ptr + R)
    pull, mean_gap = tl.load(factors_ptr + 2 * R), tl.load(factors_ptr + 3 * R)
    for start in range(0, V, BLOCK):
        columns = start + lanes
        x = _load_logits(logits_ptr, bias_ptr, columns, row_stride, HAS_BIAS)
        _store_gradient(
            dlogits_ptr, x, columns, zero, V, row_stride, peak, scale, pull, mean_gap, slope,
            inner, cap, HAS_CAP, HAS_PULL,
        )  # fmt: skip


@triton.jit
def _scale_kernel(
    gradient_ptr, out_ptr, scale_ptr, numel, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr
):
    """out = scale * gradient in float32; a scale of 1 in place touches no memory."""
    scale = tl.load(scale_ptr)
    if (not IN_PLACE) or scale != 1.0:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        gradient = tl.load(gradient_ptr + offsets, mask=offsets < numel, other=0.0)
        scaled = (gradient.to(tl.float32) * scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offsets, scaled, mask=offsets < numel)
