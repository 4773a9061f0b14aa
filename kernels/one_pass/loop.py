"""The pass over chunks of rows: from hidden states and head to log-probs, loss and gradients.

For each chunk: (1) a GEMM writes the logits of its rows to a slab, in float32, a few rows at a time
where gradients have a slab of their own; (2) the row function turns each row into its log-prob and,
since the row's weight is known, its gradient in the logits; (3) and (4) two GEMMs carry that to
hidden states and head. The next chunk reuses the slabs: the logits never exist whole, nothing is
computed twice, and a dead row is not computed at all.

Shapes: T rows, L live ones, R of a chunk, D width, V vocabulary (a process's shard of it where the
head is sharded), C terms of the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..rows.contract import RowOutputs
from ..rows.forms import row_value
from ..rows.sharded import sharded_policy_rows
from . import gemm
from .chunks import Chunks, padded, plan_chunks
from .gemm import Targets
from .gradients import Chunk, Gradients, allocate_gradients
from .live_rows import LiveRows, find_live_rows, normalised
from .options import PassInputs, PassOptions


class PassResult(NamedTuple):
    loss: Tensor
    terms_C: Tensor
    kl: Tensor
    logprob_T: Tensor
    entropy_T: Tensor | None
    top1_T: Tensor | None
    gradients: Gradients


def one_pass(
    inputs: PassInputs, options: PassOptions, head_grad_VD: Tensor | None = None
) -> PassResult:
    """loss = kl - sum(terms), terms = terms_CT . value, and the gradients of the loss.

    Without a form, value = logprob and kl = 0; with one, see `rows/forms.py`. Given
    `entropy_weight_T` and the option `entropy`, the gradients, though not the loss, are those of
    loss + entropy_weight . entropy. The head's gradient times `unscale` is added to `head_grad_VD`
    if that is given, and is then not among the result's.
    """
    T, V = len(inputs.hidden_TD), len(inputs.head_VD)
    live = find_live_rows(inputs, V if options.shard is None else options.shard.vocab_size)
    row, unscale = normalised(live.row, options.dtype)
    sums = allocate_gradients(inputs, options, live, unscale, head_grad_VD)
    outputs = _allocate_outputs(row.weight_R, options, sums.wanted)
    slabs = _allocate_slabs(inputs, options, row.weight_R.numel(), sums.wanted)
    bias_V = inputs.bias_V
    if bias_V is not None:
        bias_V = torch.nn.functional.pad(bias_V.float(), (0, padded(V) - V))[:V]
    head_VD = _gemm_operand(inputs.head_VD, options.dtype)
    policy_rows = _row_function(options)

    L = row.weight_R.numel()
    for start in range(0, L, slabs.chunks.rows):
        stop = min(start + slabs.chunks.rows, L)
        hidden_RD = live.take(inputs.hidden_TD, start, stop).to(options.dtype).contiguous()
        dlogits_RV = slabs.dlogits_RS[: stop - start, :V]
        for first in range(start, stop, slabs.chunks.slab_rows):
            last = min(first + slabs.chunks.slab_rows, stop)
            here = slice(first - start, last - start)
            logits_RV = slabs.logits_RS[: last - first, :V]
            gemm.project(hidden_RD[here], head_VD, logits_RV)
            policy_rows(
                logits_RV,
                dlogits_RV[here] if sums.wanted else None,
                bias_V,
                row.rows(first, last),
                outputs.rows(first, last),
                options.constants,
            )
        if outputs.target_grad_R is not None:
            target_R = row.target_R[start:stop]
            if options.shard is not None:
                target_R = options.shard.local(target_R, V).clamp(min=0)
            targets = Targets(target_R, outputs.target_grad_R[start:stop])
            chunk = Chunk(start, stop, hidden_RD, dlogits_RV, targets)
            sums.add(chunk, head_VD, options)

    terms_C, kl = _sums(live, outputs.logprob_R)
    loss = (kl - terms_C.sum()).float()
    values_T = (live.all_rows(each, T) for each in outputs[:3])
    return PassResult(loss, terms_C.float(), kl.float(), *values_T, sums.gradients)


def _sums(live: LiveRows, logprob_L: Tensor) -> tuple[Tensor, Tensor]:
    """The terms of the loss and its KL, in float64, as sums of signed addends may cancel."""
    row, live_L = live.row, live.live_L
    if live_L is None:
        live_L = torch.ones_like(logprob_L, dtype=torch.bool)
    value_L = logprob_L.where(live_L & (row.weight_R != 0), 0).double()
    kl = value_L.new_zeros(())
    if row.forms is not None:
        seen_L = logprob_L.where(live_L, 0).double()
        value_L, kl_L = row_value(row.weight_R, seen_L, row.forms)
        value_L = value_L.where(row.weight_R != 0, 0)
        kl_coef_L = row.forms.kl_coef_R
        kl = (kl_coef_L * kl_L.where(kl_coef_L != 0, 0)).sum()
    return (live.terms_CL.double() * value_L).sum(1), kl


class _Slabs(NamedTuple):
    """Logits of a few rows, and gradients of a chunk; one memory where gradients take no other."""

    chunks: Chunks
    logits_RS: Tensor
    dlogits_RS: Tensor


def _allocate_slabs(inputs: PassInputs, options: PassOptions, L: int, gradient: bool) -> _Slabs:
    V, D = inputs.head_VD.shape
    stride, device = padded(V), inputs.hidden_TD.device
    apart = gradient and _gradients_lie_apart(inputs, options)
    itemsize = options.dtype.itemsize if apart else None
    # Processes that share a head reduce chunk by chunk, so all must plan the same chunks.
    width = stride if options.shard is None else padded(options.shard.width)
    chunks = plan_chunks(L, width, D, itemsize, options.workspace_bytes)
    logits_RS = dlogits_RS = _slab(chunks.slab_rows, V, torch.float32, device)
    if apart:
        dlogits_RS = _slab(chunks.rows, V, options.dtype, device)
    return _Slabs(chunks, logits_RS, dlogits_RS)


def _slab(rows: int, V: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of V columns, padded with zeros up to the stride; row functions keep these zeros.

    oneDNN's bfloat16 GEMM for AMX reads rows up to the next multiple of 32 columns and multiplies
    what it finds by 0, so NaN in the padding would be NaN in the result.
    """
    slab = torch.empty((rows, padded(V)), dtype=dtype, device=device)
    slab[:, V:] = 0
    return slab


def _gradients_lie_apart(inputs: PassInputs, options: PassOptions) -> bool:
    """Whether gradients of logits have a slab of their own, in the operands' 16 bits."""
    device, dtype = inputs.hidden_TD.device, options.dtype
    if dtype == torch.float32 or device.type == "cuda":
        return dtype != torch.float32
    if not inputs.hidden_TD.dtype == inputs.head_VD.dtype == dtype:
        return False  # autocast on a CPU: its products would round gradients that are float32
    return options.backend == "triton" or gemm.keeps_16_bits(dtype, device)


def _allocate_outputs(weight_L: Tensor, options: PassOptions, gradient: bool) -> RowOutputs:
    return RowOutputs(
        torch.empty_like(weight_L),
        torch.empty_like(weight_L) if options.entropy else None,
        torch.empty_like(weight_L) if options.top1 else None,
        torch.empty_like(weight_L) if gradient else None,
    )


def _gemm_operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`, copied unless its rows or columns are contiguous.

    GEMMs read both orders, and may read past the end of a row.
    """
    tensor = tensor.to(dtype)
    return tensor if tensor.T.is_contiguous() else tensor.contiguous()


def _row_function(options: PassOptions) -> Callable[..., None]:
    if options.backend == "triton":
        from ..rows import triton_rows as rows
    else:
        from ..rows import torch_rows as rows
    if options.shard is not None:
        return sharded_policy_rows(options.shard, rows.row_statistics, rows.row_gradient)
    return rows.policy_rows
