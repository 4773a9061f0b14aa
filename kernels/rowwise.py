"""The row function in Triton; its arithmetic is in `row_functions.py`.

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
from .policy import Policy
from .row_functions import (
    _entropy,
    _gap,
    _load_if,
    _load_logits,
    _online_entropy,
    _online_softmax,
    _policy_coefficient,
    _store_dead_row,
    _store_if,
    _target_logprob,
    _transform,
)

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


@triton.jit(
    # Scalars at any offset of a chunk: their alignment would only compile the same code twice.
    do_not_specialize_on_alignment=[
        "target_ptr",
        "weight_ptr",
        "logprob_ptr",
        "entropy_ptr",
        "entropy_weight_ptr",
        "top1_ptr",
        "policy_ptr",
        "kl_coef_ptr",
    ],
    do_not_specialize=["policy_stride"],
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
    top1_ptr,  # (R,) float32
    policy_ptr,  # (3, policy_stride) float32, see Policy
    kl_coef_ptr,  # (R,) float32
    policy_stride,
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
    HAS_POLICY: tl.constexpr,
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
    weight = tl.load(weight_ptr + row)
    pull = _load_if(entropy_weight_ptr, row, HAS_ENTROPY_WEIGHT)
    kl_coef = _load_if(kl_coef_ptr, row, HAS_POLICY)

    if (weight == 0.0) & (pull == 0.0) & (kl_coef == 0.0):
        tl.store(logprob_ptr + row, float("nan"))
        _store_if(entropy_ptr, row, float("nan"), HAS_ENTROPY)
        _store_if(top1_ptr, row, float("nan"), HAS_TOP1)
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
        _store_if(top1_ptr, row, tl.where(target_z == peak, 1.0, 0.0), HAS_TOP1)
        if HAS_POLICY:
            policy_ptr += row
            weight = _policy_coefficient(
                weight, kl_coef, logprob, policy_ptr, policy_stride, low, high, importance_cap
            )

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
    top1_R: Tensor | None = None,
    policy: Policy | None = None,
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
            logprob_R if top1_R is None else top1_R,
            weight_R if policy is None else policy.logprob_3R,
            weight_R if policy is None else policy.kl_coef_R,
            0 if policy is None else policy.logprob_3R.stride(0),
            row_stride,
            V,
            transform.slope,
            transform.inner,
            0.0 if transform.cap is None else transform.cap,
            *((0.0, 0.0, 0.0) if policy is None else (policy.low, policy.high, policy.cap)),
            HAS_BIAS=bias_V is not None,
            HAS_CAP=transform.cap is not None,
            HAS_ENTROPY=entropy_R is not None,
            HAS_ENTROPY_WEIGHT=entropy_weight_R is not None,
            HAS_TOP1=top1_R is not None,
            HAS_POLICY=policy is not None,
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
