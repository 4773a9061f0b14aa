"""The row functions on the Triton backend: launches of the kernels in `triton_kernels.py`.

Shapes: R rows of a slab, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .contract import LogitConstants, RowInputs, RowOutputs
from .forms import RATIOS, SHAPINGS
from .statistics import Factors, Statistics
from .triton_kernels import (
    _policy_rows_kernel,
    _row_gradient_kernel,
    _row_statistics_kernel,
    _scale_kernel,
)


class LaunchShape(NamedTuple):
    block: int  # columns that a program holds at once
    warps: int
    row_fits: bool  # V <= block: the row is read once


# Registers hold a row of 8192 logits: 16 a thread with 512 threads, which takes 52 to 101 registers
# on sm_90. At 16384 a softcap spills on every device, and at 32768 everything does. Wider rows, as
# of production vocabularies, are read twice, in blocks of 4096: 8 logits a thread, two 16-byte
# loads, one 16-byte store of a 16-bit gradient, and 32 registers on sm_90 (at most 40 with float32
# gradients on sm_80, 64 with a softcap). Four such programs fill an SM with 64 KiB in flight, three
# times what keeps an H100's memory busy. tests/kernels/test_compile.py checks these figures.
_WIDEST_ROW_ON_CHIP = 8192
_STREAMED_BLOCK = 4096
_THREADS = 512  # a program; fewer where each would have less than 8 logits
_SCALE_BLOCK = 4096


def launch_shape(V: int, warp_size: int) -> LaunchShape:
    """Block, warps and whether a row of V logits is read once."""
    row_fits = V <= _WIDEST_ROW_ON_CHIP
    block = max(triton.next_power_of_2(V), 64) if row_fits else _STREAMED_BLOCK
    threads = min(_THREADS, block // 8)
    return LaunchShape(block, max(1, threads // warp_size), row_fits)


def policy_rows(
    logits_RV: Tensor,
    dlogits_RV: Tensor | None,
    bias_V: Tensor | None,
    inputs: RowInputs,
    outputs: RowOutputs,
    constants: LogitConstants,
) -> None:
    """Launches `_policy_rows_kernel`; arguments as in `torch_rows.policy_rows`.

    Rows of both slabs are padded to the same multiple of 16 elements, and so is the bias; the
    gradient's padding becomes 0.
    """
    R, V = logits_RV.shape
    shape = launch_shape(V, _warp_size(logits_RV.device))
    forms = inputs.forms
    shaping = None if forms is None else forms.shaping
    weight_R, logprob_R = inputs.weight_R, outputs.logprob_R  # placeholders for absent tensors
    with torch.cuda.device_of(logits_RV):
        _policy_rows_kernel[(R,)](
            logits_RV,
            logits_RV if dlogits_RV is None else dlogits_RV,
            logprob_R if outputs.target_grad_R is None else outputs.target_grad_R,
            logits_RV if bias_V is None else bias_V,
            inputs.target_R,
            weight_R,
            logprob_R,
            logprob_R if outputs.entropy_R is None else outputs.entropy_R,
            weight_R if inputs.entropy_weight_R is None else inputs.entropy_weight_R,
            logprob_R if outputs.top1_R is None else outputs.top1_R,
            weight_R if forms is None else forms.constants_PR,
            weight_R if forms is None else forms.kl_coef_R,
            0 if forms is None else forms.constants_PR.stride(0),
            _row_stride(logits_RV, dlogits_RV),
            V,
            *_scalars(constants),
            *((0.0, 0.0, 0.0) if forms is None else forms.bounds),
            HAS_BIAS=bias_V is not None,
            HAS_CAP=constants.cap is not None,
            HAS_ENTROPY=outputs.entropy_R is not None,
            HAS_ENTROPY_WEIGHT=inputs.entropy_weight_R is not None,
            HAS_TOP1=outputs.top1_R is not None,
            RATIO=0 if forms is None else RATIOS[forms.ratio].number,
            SHAPING=0 if shaping is None else SHAPINGS[shaping].number,
            KL_TIMES_RATIO=forms is not None and forms.kl_times_ratio,
            WRITE_GRADIENT=dlogits_RV is not None,
            ROW_FITS=shape.row_fits,
            BLOCK=shape.block,
            num_warps=shape.warps,
        )


def row_statistics(
    logits_RV: Tensor,
    bias_V: Tensor | None,
    target_R: Tensor,
    constants: LogitConstants,
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
            *_scalars(constants),
            HAS_BIAS=bias_V is not None,
            HAS_CAP=constants.cap is not None,
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
    constants: LogitConstants,
) -> None:
    """Launches `_row_gradient_kernel`; arguments as in `torch_rows.row_gradient`."""
    R, V = logits_RV.shape
    shape = launch_shape(V, _warp_size(logits_RV.device))
    has_pull = factors.pull_R is not None
    placeholder_R = factors.peak_R  # unused where there is no pull
    factors_4R = torch.stack([placeholder_R if each is None else each for each in factors])
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
            *_scalars(constants),
            HAS_BIAS=bias_V is not None,
            HAS_CAP=constants.cap is not None,
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
    """Whether kernels run on the device: on CUDA, or anywhere under TRITON_INTERPRET=1."""
    interpreted = not isinstance(_policy_rows_kernel, triton.runtime.JITFunction)
    return device.type == "cuda" or interpreted


def _row_stride(logits_RV: Tensor, dlogits_RV: Tensor | None = None) -> int:
    row_stride = logits_RV.stride(0)
    assert row_stride % 16 == 0 and row_stride >= logits_RV.shape[1]
    assert dlogits_RV is None or dlogits_RV.stride(0) == row_stride
    return row_stride


def _scalars(constants: LogitConstants) -> tuple[float, float, float]:
    return constants.slope, constants.inner, 0.0 if constants.cap is None else constants.cap


def _warp_size(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
