"""The row function in Triton, and the arithmetic that every row kernel shares.

A slab of logits has rows of V columns, `row_stride` elements apart, a multiple of 16. The columns
from V to the stride belong to the slab, and the bias is as long: they are read and written without
meaning, so that every access is 16 bytes wide whatever V is.

Shapes: R rows of a slab, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import LogitTransform

# Columns that a program holds at once, and logits of each thread. 4096 over 16 warps of 32 is 8 a
# thread: two 16-byte loads and, of a 16-bit gradient, one 16-byte store. That compiles to 32
# registers for sm_90 (at most 40 with float32 gradients on sm_80, 64 with a softcap, see
# tests/kernels/test_compile.py): four programs fill an SM and have 64 KiB in flight there, three
# times what keeps an H100's memory busy. 16 a thread takes 45 to 90 registers, and spills on sm_80.
# Shorter rows get a smaller block and fewer warps.
MAX_BLOCK = 4096
_LOGITS_PER_THREAD = 8
_SCALE_BLOCK = 4096


def launch_shape(V: int, warp_size: int) -> tuple[int, int]:
    """BLOCK and num_warps for rows of V logits."""
    block = min(MAX_BLOCK, max(triton.next_power_of_2(V), 64))
    warps = max(1, min(16, block // (_LOGITS_PER_THREAD * warp_size)))
    return block, warps


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
    """z and dz/dx of a logit x that has its bias; see LogitTransform."""
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
    """Running maximum, and sum of exp(z - maximum) where `counts`, with one more block of z."""
    new_peak = tl.maximum(peak, tl.max(z, 0))
    # Where all logits so far are -inf, any finite base keeps the sum at 0.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    block = tl.sum(tl.where(counts, tl.exp(z - base), 0.0), 0)
    return new_peak, others * tl.exp(peak - base) + block


@triton.jit
def _gap(z, peak):
    """z - peak, no lower than where its exponential is 0 anyway: 0 * -inf would be NaN."""
    return tl.maximum(z - peak, -128.0)


@triton.jit
def _online_entropy(peak, rest, ties, spread, z):
    """With one more block of z, of gap = z - maximum: the sum of exp(gap) below the maximum, how
    often that occurs, and the sum of exp(gap) gap. `peak` is still that of the blocks before.
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

    The peaks stay out of the sum: the log of a total that is nearly 1 then has all its digits.
    """
    total = rest + ties
    one_peak = (ties == 1.0) & (rest < 1.0)
    log_total = tl.where(one_peak, _log1p(tl.where(one_peak, rest, 0.0)), tl.log(total))
    return log_total - spread / total, spread / total


@triton.jit
def _row_weights(weight_ptr, entropy_weight_ptr, row, HAS_ENTROPY_WEIGHT: tl.constexpr):
    """What multiplies the gradients of -logprob and of the entropy."""
    entropy_weight = 0.0
    if HAS_ENTROPY_WEIGHT:
        entropy_weight = tl.load(entropy_weight_ptr + row)
    return tl.load(weight_ptr + row), entropy_weight


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

    The target stays out of `others`: 1 - p of a target that is nearly certain is then others /
    total with all its digits, where p - 1 would have few left.
    """
    target_exp = tl.exp(target_z)
    total = target_exp + others
    # Where p > 1/2, or (z - max) - log(sum); with logits of 1e4, z - lse would be off by 1e-3.
    certain = others < target_exp
    ratio = tl.where(certain, others / target_exp, 1.0)
    return tl.where(certain, -_log1p(ratio), target_z - tl.log(total)), total


@triton.jit(
    # Scalars at any offset of a chunk: their alignment would only compile the same code twice.
    do_not_specialize_on_alignment=[
        "target_ptr",
        "weight_ptr",
        "logprob_ptr",
        "entropy_ptr",
        "entropy_weight_ptr",
    ]
)
def _weighted_ce_rows_kernel(
    logits_ptr,  # (R, row_stride) float32
    dlogits_ptr,  # (R, row_stride) of the operands' dtype; may be logits_ptr
    bias_ptr,  # (row_stride,) float32
    target_ptr,  # (R,) int64
    weight_ptr,  # (R,) float32
    logprob_ptr,  # (R,) float32
    entropy_ptr,  # (R,) float32
    entropy_weight_ptr,  # (R,) float32
    row_stride,
    V,
    slope,
    inner,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_ENTROPY_WEIGHT: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """logprob = z[target] - log sum exp z; dlogits = weight (softmax(z) - onehot) dz/dx.

    entropy = -sum p log p, and to dlogits is added -entropy_weight p (log p + entropy) dz/dx.
    One program a row. It reads the row twice and writes the gradient once: 10 bytes a logit for
    16-bit operands, 12 for float32. A row of weight 0 is not read.
    """
    row = tl.program_id(0).to(tl.int64)  # R * row_stride passes 2^31
    logits_ptr += row * row_stride
    dlogits_ptr += row * row_stride
    lanes = tl.arange(0, BLOCK)
    weight, pull = _row_weights(weight_ptr, entropy_weight_ptr, row, HAS_ENTROPY_WEIGHT)

    if (weight == 0.0) & (pull == 0.0):
        tl.store(logprob_ptr + row, float("nan"))
        if HAS_ENTROPY:
            tl.store(entropy_ptr + row, float("nan"))
        _store_dead_row(dlogits_ptr, V, row_stride, lanes, WRITE_GRADIENT, BLOCK)
    else:
        # Before anything is written: the gradient may take the logits' place.
        target = tl.load(target_ptr + row).to(tl.int32)  # as wide as the columns
        target_x = _load_logits(logits_ptr, bias_ptr, target, row_stride, HAS_BIAS)
        target_z, _target_dz = _transform(target_x, slope, inner, cap, HAS_CAP)

        peak = float("-inf")
        others = 0.0
        rest, ties, spread = 0.0, 0.0, 0.0
        for start in range(0, V, BLOCK):
            columns = start + lanes
            x = _load_logits(logits_ptr, bias_ptr, columns, row_stride, HAS_BIAS)
            z, _dz = _transform(x, slope, inner, cap, HAS_CAP)
            z = tl.where(columns < V, z, float("-inf"))
            if HAS_ENTROPY:
                rest, ties, spread = _online_entropy(peak, rest, ties, spread, z)
            peak, others = _online_softmax(peak, others, z, columns != target)
        logprob, total = _target_logprob(target_z - peak, others)
        tl.store(logprob_ptr + row, logprob)
        if HAS_ENTROPY:
            entropy, mean_gap = _entropy(rest, ties, spread)
            tl.store(entropy_ptr + row, entropy)

        if WRITE_GRADIENT:
            last = (V - 1) // BLOCK * BLOCK
            for start in range(0, V, BLOCK):
                # Backwards: what was read last is what the L2 still holds.
                columns = last - start + lanes
                x = _load_logits(logits_ptr, bias_ptr, columns, row_stride, HAS_BIAS)
                z, dz = _transform(x, slope, inner, cap, HAS_CAP)
                above_onehot = tl.where(columns == target, -others, tl.exp(z - peak))
                dlogits = (weight / total) * above_onehot * dz
                if HAS_ENTROPY_WEIGHT:
                    gap = _gap(z, peak)  # log p + entropy = gap - E[gap]
                    dlogits -= (pull / total) * tl.exp(gap) * (gap - mean_gap) * dz
                dlogits = dlogits.to(dlogits_ptr.dtype.element_ty)
                tl.store(dlogits_ptr + columns, dlogits, mask=columns < row_stride)


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
) -> None:
    """Launches `_weighted_ce_rows_kernel`; arguments as in `chunked_torch.weighted_ce_rows`.

    Rows of both slabs are the same multiple of 16 elements apart, and theirs up to there; the
    bias is the head of a vector of so many elements.
    """
    R, V = logits_RV.shape
    row_stride = logits_RV.stride(0)
    assert row_stride % 16 == 0 and row_stride >= V
    assert dlogits_RV is None or dlogits_RV.stride(0) == row_stride
    block, warps = launch_shape(V, _warp_size(logits_RV.device))
    with torch.cuda.device_of(logits_RV):
        _weighted_ce_rows_kernel[(R,)](
            logits_RV,
            logits_RV if dlogits_RV is None else dlogits_RV,
            logits_RV if bias_V is None else bias_V,
            target_R,
            weight_R,
            logprob_R,
            logprob_R if entropy_R is None else entropy_R,
            weight_R if entropy_weight_R is None else entropy_weight_R,
            row_stride,
            V,
            transform.slope,
            transform.inner,
            0.0 if transform.cap is None else transform.cap,
            HAS_BIAS=bias_V is not None,
            HAS_CAP=transform.cap is not None,
            HAS_ENTROPY=entropy_R is not None,
            HAS_ENTROPY_WEIGHT=entropy_weight_R is not None,
            WRITE_GRADIENT=dlogits_RV is not None,
            BLOCK=block,
            num_warps=warps,
        )


def scale_gradient(gradient: Tensor, scale: Tensor, out: Tensor) -> None:
    """out = scale * gradient, with `scale` read on the device; both contiguous."""
    numel = gradient.numel()
    if numel == 0:
        return
    with torch.cuda.device_of(gradient):
        _scale_kernel[(triton.cdiv(numel, _SCALE_BLOCK),)](
            gradient, out, scale, numel, IN_PLACE=out is gradient, BLOCK=_SCALE_BLOCK, num_warps=8
        )


def runs_on(device: torch.device) -> bool:
    """Whether kernels can run there: on CUDA, or anywhere under TRITON_INTERPRET=1."""
    interpreted = not isinstance(_weighted_ce_rows_kernel, triton.runtime.JITFunction)
    return device.type == "cuda" or interpreted


def _warp_size(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
