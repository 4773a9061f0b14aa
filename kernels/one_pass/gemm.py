"""The three matrix products of a linear cross-entropy.

    logits  = hidden head^T        dhidden = dlogits head        dhead += dlogits^T hidden

On CUDA, 16-bit operands go to the tensor cores unchanged, with a float32 result (`out_dtype`), so
that neither logits nor partial sums are rounded to 16 bits. On CPUs PyTorch rounds the result of a
16-bit product to 16 bits, so for logits the operands are widened first, the head a few MiB at a
time. Gradients use the CPU's bfloat16 units if it has them and the operands are bfloat16: each
chunk's product is rounded to bfloat16, and chunks are summed in float32.

The rows (or columns) of operands are contiguous, or padded with zeros, because libraries may read
past the end of a row; see `loop._slab`.

The target's element of dlogits is kept apart, see `TargetGradient` in `rows/statistics.py`. Its
products are added afterwards, in float32.

Shapes: R rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

# Before 2.10, addmm with out_dtype takes its addend in the operands' dtype only.
_ADDMM_TAKES_FP32 = tuple(int(number) for number in torch.__version__.split(".")[:2]) >= (2, 10)
_BLOCK_BYTES = 16 * 2**20


class Targets(NamedTuple):
    """The gradients to be added to dlogits at the targets."""

    index_R: Tensor  # int64
    grad_R: Tensor  # float32


def project(hidden_RD: Tensor, head_VD: Tensor, out_RV: Tensor) -> None:
    """out = hidden head^T, in float32."""
    if head_VD.dtype == torch.float32 or head_VD.is_cuda:
        _multiply(hidden_RD, head_VD.T, out_RV)
        return
    hidden_RD = hidden_RD.float()
    for vocabulary in _blocks(*head_VD.shape):
        torch.mm(hidden_RD, head_VD[vocabulary].float().T, out=out_RV[:, vocabulary])


def grad_hidden(dlogits_RV: Tensor, head_VD: Tensor, out_RD: Tensor, targets: Targets) -> None:
    """out = dlogits head, in float32."""
    if _multiplies_unwidened(dlogits_RV, head_VD):
        _multiply(dlogits_RV, head_VD, out_RD)
    else:
        out_RD.zero_()
        for vocabulary in _blocks(*head_VD.shape):
            out_RD.addmm_(dlogits_RV[:, vocabulary].float(), head_VD[vocabulary].float())
    out_RD.addcmul_(head_VD.index_select(0, targets.index_R).float(), targets.grad_R[:, None])


def grad_head(
    dlogits_RV: Tensor,
    hidden_RD: Tensor,
    out_VD: Tensor,
    targets: Targets,
    *,
    accumulate: bool,
    scale: Tensor | None = None,
) -> None:
    """out = scale dlogits^T hidden, plus the present `out` if `accumulate`.

    The sum is rounded to the dtype of `out` if that is not float32.
    """
    _sum_over_rows(dlogits_RV, hidden_RD, out_VD, accumulate, scale)
    grad_R = targets.grad_R if scale is None else targets.grad_R * scale
    add_rows(out_VD, targets.index_R, hidden_RD * grad_R[:, None])


def add_rows(out: Tensor, index_R: Tensor, rows: Tensor) -> None:
    """out[index] += rows, deterministically, for float32 rows and an index that may repeat."""
    if out.dtype != torch.float32:
        index_R, rows = _joined(index_R, rows)
    if out.device.type == "cpu":
        out.index_add_(0, index_R, rows.to(out.dtype))  # in order
    else:
        # Deterministic, as it sorts; index_add_ would use atomics.
        out.index_put_((index_R,), rows.to(out.dtype), accumulate=True)


def _joined(index_R: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The float32 sum of the rows of each index. Repeated 16-bit additions stop accumulating.

    It returns as many rows as it takes, so that the host need not know how many indices differ;
    the rest are zeros for index 0.
    """
    index_R, order_R = index_R.sort(stable=True)
    run_R = torch.ones_like(index_R)
    run_R[1:] = index_R[1:] != index_R[:-1]
    run_R = run_R.cumsum(0) - 1
    sums, joined_R = torch.zeros_like(rows), torch.zeros_like(index_R)
    add_rows(sums, run_R, rows.index_select(0, order_R))
    return joined_R.scatter_(0, run_R, index_R), sums


def _sum_over_rows(
    dlogits_RV: Tensor,
    hidden_RD: Tensor,
    out_VD: Tensor,
    accumulate: bool,
    scale: Tensor | None,
) -> None:
    unwidened = _multiplies_unwidened(dlogits_RV, hidden_RD)
    if unwidened and scale is None and _adds_in_one_gemm(dlogits_RV, out_VD):
        if accumulate:
            _multiply_add(dlogits_RV.T, hidden_RD, out_VD)
        else:
            _multiply(dlogits_RV.T, hidden_RD, out_VD)
        return
    hidden_RD = hidden_RD if unwidened else hidden_RD.float()
    for vocabulary in _blocks(*out_VD.shape):
        left_BR = dlogits_RV[:, vocabulary].T
        product_BD = _product(left_BR if unwidened else left_BR.float(), hidden_RD)
        if scale is not None:
            product_BD = product_BD * scale
        if accumulate:
            out_VD[vocabulary] += product_BD
        else:
            out_VD[vocabulary] = product_BD


@cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def keeps_16_bits(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether gradient GEMMs on the device take operands of this 16-bit dtype unwidened."""
    if device.type == "cpu":
        return dtype == torch.bfloat16 and cpu_has_bfloat16()
    return device.type == "cuda" and dtype != torch.float32


def _multiplies_unwidened(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and (a.dtype == torch.float32 or keeps_16_bits(a.dtype, a.device))


def _adds_in_one_gemm(a: Tensor, out: Tensor) -> bool:
    """Whether one GEMM can add to `out`: in float32, or on CUDA in `out`'s own dtype."""
    if not a.is_cuda:
        return a.dtype == out.dtype == torch.float32
    return out.dtype in (a.dtype, torch.float32)


def _blocks(V: int, D: int) -> Iterator[slice]:
    """Blocks of the vocabulary whose float32 rows take a few MiB."""
    block = max(1, _BLOCK_BYTES // (4 * max(D, 1)))
    for start in range(0, V, block):
        yield slice(start, min(start + block, V))


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _multiply_add(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif _ADDMM_TAKES_FP32:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        for rows in _blocks(*out.shape):
            out[rows] += _product(a[rows], b)


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)
