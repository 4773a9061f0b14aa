"""The one pass: hidden states and head to log-probs, loss terms and gradients, chunk by chunk.

For the rows of a chunk: (1) a GEMM writes their logits to a slab, in float32, a few rows at a time
where their gradient lies apart; (2) the row function turns each row into its log-prob and, since
the row's weight is known, its gradient in the logits; (3) and (4), two GEMMs carry that to hidden
and head. The slabs are reused by the next chunk: logits never exist whole, nothing is computed
twice, and a row of weight 0 is not computed at all.

Shapes: T rows, L live ones, R of a chunk, D width, V vocabulary (a process's part of it where the
head is sharded), C terms of the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import LogitTransform
from ..rows.off_policy import Policy, row_value
from ..vocab_parallel import Shard, sharded_ce_rows
from . import gemm
from .chunks import padded, plan_chunks
from .gemm import Targets
from .live_rows import LiveRows, find_live_rows, normalised


class Options(NamedTuple):
    """What the pass is told besides its tensors."""

    transform: LogitTransform
    workspace_bytes: int
    backend: str
    dtype: torch.dtype  # of the GEMMs' operands
    wants: tuple[bool, bool, bool]  # a gradient for hidden, head, bias
    entropy: bool = False
    top1: bool = False
    shard: Shard | None = None  # of the vocabulary, of which head and bias are a part


class Gradients(NamedTuple):
    """Gradients of the loss, each multiplied by 1 / `unscale`; None where not wanted."""

    hidden_TD: Tensor | None
    head_VD: Tensor | None
    bias_V: Tensor | None
    unscale: Tensor  # 0-d float32


class PassResult(NamedTuple):
    loss: Tensor
    parts_C: Tensor
    kl: Tensor
    logprob_T: Tensor
    entropy_T: Tensor | None
    top1_T: Tensor | None
    gradients: Gradients


def one_pass(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    target_T: Tensor,
    terms_CT: Tensor,
    options: Options,
    entropy_weight_T: Tensor | None = None,
    policy: Policy | None = None,
    head_grad_VD: Tensor | None = None,
) -> PassResult:
    """parts = terms . logprob, loss = -sum(parts), and the gradients of the loss.

    A row's weight is the sum of its C terms. With `entropy_weight_T` and the option `entropy`, the
    gradients, though not the loss, are those of loss + entropy_weight . entropy. With a policy,
    whose `kl_coef_R` is on the terms' device and `logprob_3R` on hidden's, parts = terms . value
    and loss = kl - sum(parts); see `rows/off_policy.py`. The head's gradient, times `unscale`,
    is added to `head_grad_VD` where that is given, and is then not among the result's.
    """
    T, D = hidden_TD.shape
    V = head_VD.shape[0]
    device = hidden_TD.device
    shard = options.shard
    vocabulary = V if shard is None else shard.vocab_size
    rows = find_live_rows(terms_CT, entropy_weight_T, policy, target_T, vocabulary, device)
    L = rows.weight_L.numel()
    scaled, unscale = normalised(rows, options.dtype)

    wants_hidden, wants_head, wants_bias = options.wants
    any_gradient = any(options.wants) or head_grad_VD is not None
    dhidden_TD = _allocate(wants_hidden, (T, D), hidden_TD.dtype, device, L < T)
    dhead_VD = _allocate(wants_head, (V, D), torch.float32, device, L == 0)
    dbias_V = _allocate(wants_bias, (V,), torch.float32, device, True)
    logprob_L = torch.empty(L, dtype=torch.float32, device=device)
    entropy_L = torch.empty_like(logprob_L) if options.entropy else None
    top1_L = torch.empty_like(logprob_L) if options.top1 else None

    stride = padded(V)
    if bias_V is not None:
        bias_V = torch.nn.functional.pad(bias_V.float(), (0, stride - V))[:V]
    second_slab = any_gradient and _second_slab(options, hidden_TD, head_VD)
    head_VD = _gemm_operand(head_VD, options.dtype)
    # Processes that share a head reduce their chunks together: all must plan the same ones.
    width = stride if shard is None else padded(shard.width)
    itemsize = options.dtype.itemsize if second_slab else None
    chunks = plan_chunks(L, width, D, itemsize, options.workspace_bytes)
    logits_RS = _slab(chunks.slab_rows, V, stride, torch.float32, device)
    dlogits_RS = logits_RS
    if second_slab:
        dlogits_RS = _slab(chunks.rows, V, stride, options.dtype, device)
    target_grad_L = torch.empty_like(logprob_L) if any_gradient else None
    weighted_ce_rows = _row_function(options)

    for start in range(0, L, chunks.rows):
        stop = min(start + chunks.rows, L)
        hidden_RD = rows.take(hidden_TD, start, stop).to(options.dtype).contiguous()
        dlogits_RV = dlogits_RS[: stop - start, :V]
        for first in range(start, stop, chunks.slab_rows):
            last = min(first + chunks.slab_rows, stop)
            logits_RV = logits_RS[: last - first, :V]
            gemm.project(hidden_RD[first - start : last - start], head_VD, logits_RV)
            weighted_ce_rows(
                logits_RV,
                dlogits_RV[first - start : last - start] if any_gradient else None,
                None if target_grad_L is None else target_grad_L[first:last],
                bias_V,
                rows.target_L[first:last],
                scaled.weight_L[first:last],
                logprob_L[first:last],
                options.transform,
                None if entropy_L is None else entropy_L[first:last],
                None if scaled.entropy_weight_L is None else scaled.entropy_weight_L[first:last],
                None if top1_L is None else top1_L[first:last],
                None if scaled.policy is None else scaled.policy.rows(first, last),
            )
        if target_grad_L is None:
            continue
        target_R = rows.target_L[start:stop]
        if shard is not None:
            target_R = shard.local(target_R, V).clamp(min=0)
        targets = Targets(target_R, target_grad_L[start:stop])
        if dhidden_TD is not None:
            dhidden_RD = _chunk_of(dhidden_TD, rows.index_L, start, stop)
            gemm.grad_hidden(dlogits_RV, head_VD, dhidden_RD, targets)
            if shard is not None:
                shard.sum_(dhidden_RD)
            _store(dhidden_RD, dhidden_TD, rows.index_L, start, stop)
        if dhead_VD is not None:
            gemm.grad_head(dlogits_RV, hidden_RD, dhead_VD, targets, accumulate=start > 0)
        if head_grad_VD is not None:
            scale = unscale if options.dtype == torch.float16 else None
            gemm.grad_head(
                dlogits_RV, hidden_RD, head_grad_VD, targets, accumulate=True, scale=scale
            )
        if dbias_V is not None:
            dbias_V += dlogits_RV.sum(0, dtype=torch.float32)
            gemm.add_rows(dbias_V, targets.index_R, targets.grad_R)

    parts_C, kl = _sums(rows, logprob_L)
    gradients = Gradients(dhidden_TD, dhead_VD, dbias_V, unscale)
    values_T = (rows.all_rows(each, T) for each in (logprob_L, entropy_L, top1_L))
    loss = (kl - parts_C.sum()).float()
    return PassResult(loss, parts_C.float(), kl.float(), *values_T, gradients)


def _sums(rows: LiveRows, logprob_L: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of the loss and its KL, in float64: sums of signed terms that may cancel."""
    live_L = torch.ones_like(logprob_L, dtype=torch.bool) if rows.live_L is None else rows.live_L
    value_L = logprob_L.where(live_L & (rows.weight_L != 0), 0).double()
    kl = value_L.new_zeros(())
    if rows.policy is not None:
        seen_L = logprob_L.where(live_L, 0).double()
        value_L, kl_L = row_value(rows.weight_L, seen_L, rows.policy)
        value_L = value_L.where(rows.weight_L != 0, 0)
        kl = (rows.policy.kl_coef_R * kl_L.where(rows.policy.kl_coef_R != 0, 0)).sum()
    return (rows.terms_CL.double() * value_L).sum(1), kl


def _gemm_operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`, copied if it must be: rows or columns follow each other without gaps.

    GEMMs read both orders, and may read on behind a row.
    """
    tensor = tensor.to(dtype)
    return tensor if tensor.T.is_contiguous() else tensor.contiguous()


def _slab(rows: int, V: int, stride: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of V columns, and zeros behind them up to the stride, which row functions leave there.

    oneDNN's bfloat16 GEMM for AMX reads rows up to the next multiple of 32 columns and multiplies
    what it finds by 0: of NaN there, that is NaN in the result.
    """
    slab = torch.empty((rows, stride), dtype=dtype, device=device)
    slab[:, V:] = 0
    return slab


def _allocate(
    wanted: bool, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, zero: bool
) -> Tensor | None:
    if not wanted:
        return None
    return (torch.zeros if zero else torch.empty)(shape, dtype=dtype, device=device)


def _second_slab(options: Options, hidden_TD: Tensor, head_VD: Tensor) -> bool:
    """Whether gradients of logits, in the operands' 16 bits, lie apart from the logits."""
    if options.dtype == torch.float32 or hidden_TD.is_cuda:
        return options.dtype != torch.float32
    if not hidden_TD.dtype == head_VD.dtype == options.dtype:
        return False  # autocast on a CPU: its products would round gradients that are float32
    return options.backend == "triton" or gemm.keeps_16_bits(options.dtype, hidden_TD.device)


def _row_function(options: Options) -> Callable[..., None]:
    if options.backend == "triton":
        from ..rows import triton_rows as rows
    else:
        from ..rows import torch_rows as rows
    if options.shard is not None:
        return sharded_ce_rows(options.shard, rows.row_statistics, rows.row_gradient)
    return rows.weighted_ce_rows


def _chunk_of(dhidden_TD: Tensor, index_L: Tensor | None, start: int, stop: int) -> Tensor:
    """Where a chunk of the hidden states' gradient can be made in float32."""
    if index_L is None and dhidden_TD.dtype == torch.float32:
        return dhidden_TD[start:stop]
    shape = (stop - start, dhidden_TD.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=dhidden_TD.device)


def _store(
    dhidden_RD: Tensor, dhidden_TD: Tensor, index_L: Tensor | None, start: int, stop: int
) -> None:
    if index_L is not None:
        dhidden_TD.index_copy_(0, index_L[start:stop], dhidden_RD.to(dhidden_TD.dtype))
    elif dhidden_TD.dtype != torch.float32:
        dhidden_TD[start:stop] = dhidden_RD
