"""Launches of the row kernels in `triton_kernels.py`: the row functions on the Triton backend.

Shapes: R rows of a slab, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..checks import LogitTransform
from .off_policy import Policy
from .statistics import Factors, Statistics
from .triton_kernels import (
    _row_gradient_kernel,
    _row_statistics_kernel,
    _scale_kernel,
    _weighted_ce_rows_kernel,
)


class LaunchShape(NamedTuple):
    block: int  # columns that a program holds at once
    warps: int
    row_fits: bool  # V <= block: the row is read once


# Registers hold a row of 8192: over 512 threads that is 16 logits each, and 52 to 101
# registers by sm_90's compiler. At 16384, 32 a thread, a softcap spills on every device, and at
# 32768 everything does. Production vocabularies are wider: such rows are read twice, in blocks of
# 4096. That is 8 logits a thread, two 16-byte loads and, of a 16-bit gradient, one 16-byte store;
# 32 registers for sm_90 (at most 40 with float32 gradients on sm_80, 64 with a softcap): four
# programs fill an SM and have 64 KiB in flight there, three times what keeps an H100's memory
# busy. tests/kernels/test_compile.py holds all of this to be so.
_WIDEST_ROW_ON_CHIP = 8192
_STREAMED_BLOCK = 4096
_THREADS = 512  # of a program, or fewer where they would have less than 8 logits each
_SCALE_BLOCK = 4096


def launch_shape(V: int, warp_size: int) -> LaunchShape:
    """How rows of V logits are read."""
    row_fits = V <= _WIDEST_ROW_ON_CHIP
    block = max(triton.next_power_of_2(V), 64) if row_fits else _STREAMED_BLOCK
    threads = min(_THREADS, block // 8)
    return LaunchShape(block, max(1, threads // warp_size), row_fits)


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
    """Launches `_weighted_ce_rows_kernel`; arguments as in `torch_rows.weighted_ce_rows`.

    Rows of both slabs are the same multiple of 16 elements apart, and theirs up to there: behind
    column V the gradient is 0. The bias is the head of a vector of so many elements.
    """
    R, V = logits_RV.shape
    shape = launch_shape(V, _warp_size(logits_RV.device))
    with torch.cuda.device_of(logits_RV):
        _weighted_ce_rows_kernel[(R,)](
            logits_RV,
            logits_RV if dlogits_RV is None else dlogits_RV,
            logprob_R if target_grad_R is None else target_grad_R,
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
            _row_stride(logits_RV, dlogits_RV),
            V,
            *_constants(transform),
            *((0.0, 0.0, 0.0) if policy is None else (policy.low, policy.high, policy.cap)),
            HAS_BIAS=bias_V is not None,
            HAS_CAP=transform.cap is not None,
            HAS_ENTROPY=entropy_R is not None,
            HAS_ENTROPY_WEIGHT=entropy_weight_R is not None,
            HAS_TOP1=top1_R is not None,
            HAS_POLICY=policy is not None,
            WRITE_GRADIENT=dlogits_RV is not None,
            ROW_FITS=shape.row_fits,
            BLOCK=shape.block,
            num_warps=shape.warps,
        )


def row_statistics(
    logits_RV: Tensor,
    bias_V: Tensor | None,
    target_R: Tensor,
    transform: LogitTransform,
    entropy: bool,
) -> Statistics:
    """Launches `_row_statistics_kernel`; arguments as in `torch_rows.row_statistics`."""
    R, V = logits_RV.shape
    statistics_6R = torch.empty((6, R), dtype=torch.float32, device=logits_RV.device)
    shape = launch_shape(V, _warp_size(logits_RV.device))
    with torch.cuda.device_of(logits_RV):
        _row_statistics_kernel[(R,)](
            logits_RV,
            logits_RV if bias_V is None else bias_V,
            target_R,
            statistics_6R,
            R,
            _row_stride(logits_RV),
            V,
            *_constants(transform),
            HAS_BIAS=bias_V is not None,
            HAS_CAP=transform.cap is not None,
            HAS_ENTROPY=entropy,
            BLOCK=shape.block,
            num_warps=shape.warps,
        )
    return Statistics(*statistics_6R)


def row_gradient(
    logits_RV: Tensor,
    dlogits_RV: Tensor,
    bias_V: Tensor | None,
    zero_R: Tensor,
    factors: Factors,
    transform: LogitTransform,
) -> None:
    """Launches `_row_gradient_kernel`; arguments as in `torch_rows.row_gradient`."""
    R, V = logits_RV.shape
    shape = launch_shape(V, _warp_size(logits_RV.device))
    has_pull = factors.pull_R is not None
    nothing_R = factors.peak_R  # where there is no pull, what is in its place is not used
    factors_4R = torch.stack([nothing_R if each is None else each for each in factors])
    with torch.cuda.device_of(logits_RV):
        _row_gradient_kernel[(R,)](
            logits_RV,
            dlogits_RV,
            logits_RV if bias_V is None else bias_V,
            zero_R,
            factors_4R,
            R,
            _row_stride(logits_RV, dlogits_RV),
            V,
            *_constants(transform),
            HAS_BIAS=bias_V is not None,
            HAS_CAP=transform.cap is not None,
            HAS_PULL=has_pull,
            BLOCK=shape.block,
            num_warps=shape.warps,
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


def _row_stride(logits_RV: Tensor, dlogits_RV: Tensor | None = None) -> int:
    row_stride = logits_RV.stride(0)
    assert row_stride % 16 == 0 and row_stride >= logits_RV.shape[1]
    assert dlogits_RV is None or dlogits_RV.stride(0) == row_stride
    return row_stride


def _constants(transform: LogitTransform) -> tuple[float, float, float]:
    return transform.slope, transform.inner, 0.0 if transform.cap is None else transform.cap


def _warp_size(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
