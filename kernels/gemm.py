"""The three matrix products of a linear cross-entropy, each summed and returned in float32.

    logits  = hidden head^T        dhidden = dlogits head        dhead += dlogits^T hidden

bfloat16 and float16 operands go to the tensor cores as they are, with a float32 result
(`out_dtype`), so that no logit and no partial sum is rounded to them. PyTorch has such products
on CUDA only; elsewhere the operands are widened first, the head a few MiB at a time.

Shapes: R rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Before 2.10, addmm with out_dtype wants its addend in the operands' dtype.
_ADDMM_TAKES_FP32 = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)
_BLOCK_BYTES = 16 * 2**20


def project(hidden_RD: Tensor, head_VD: Tensor, out_RV: Tensor) -> None:
    """out = hidden head^T."""
    for vocabulary, head_BD in _head_blocks(head_VD):
        _mm(hidden_RD, head_BD.T, out_RV[:, vocabulary], accumulate=False)


def grad_hidden(dlogits_RV: Tensor, head_VD: Tensor, out_RD: Tensor) -> None:
    """out = dlogits head."""
    for vocabulary, head_BD in _head_blocks(head_VD):
        _mm(dlogits_RV[:, vocabulary], head_BD, out_RD, accumulate=vocabulary.start > 0)


def grad_head(dlogits_RV: Tensor, hidden_RD: Tensor, out_VD: Tensor, accumulate: bool) -> None:
    """out = dlogits^T hidden, added to what `out` holds where `accumulate`."""
    _mm(dlogits_RV.T, hidden_RD, out_VD, accumulate=accumulate)


def _head_blocks(head_VD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The head in one piece; in float32 blocks of the vocabulary where it must be widened."""
    V, D = head_VD.shape
    if head_VD.dtype == torch.float32 or head_VD.is_cuda:
        yield slice(0, V), head_VD
        return
    block = max(1, _BLOCK_BYTES // (4 * max(D, 1)))
    for start in range(0, V, block):
        stop = min(start + block, V)
        yield slice(start, stop), head_VD[start:stop].float()


def _mm(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool) -> None:
    if not a.is_cuda:
        a, b = a.float(), b.float()
    if a.dtype == torch.float32:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif not accumulate:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif _ADDMM_TAKES_FP32:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        block = max(1, _BLOCK_BYTES // (4 * max(out.shape[1], 1)))
        for start in range(0, out.shape[0], block):
            product = torch.mm(a[start : start + block], b, out_dtype=torch.float32)
            out[start : start + block].add_(product)
