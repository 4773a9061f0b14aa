"""The one pass: hidden states and head to log-probs, loss terms and gradients, chunk by chunk.

For the rows of a chunk: (1) a GEMM writes their logits to a slab, in float32; (2) the row function
turns each row into its log-prob and, since the row's weight is known, its gradient in the logits;
(3) and (4), two GEMMs carry that to hidden and head. The slab is reused by the next chunk: logits
never exist whole, nothing is computed twice, and a row of weight 0 is not computed at all.

Shapes: T rows, L live ones, R of a chunk, D width, V vocabulary, C terms of the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import gemm
from .checks import LogitTransform, check_range
from .policy import Policy, row_value

# Slab rows start at multiples of 64 elements, 128 bytes or more, and the bias is as long: a row can
# be read and written 16 bytes at a time whatever V is.
_ROW_ALIGNMENT = 64


class Options(NamedTuple):
    """What the pass is told besides its tensors."""

    transform: LogitTransform
    workspace_bytes: int
    backend: str
    dtype: torch.dtype  # of the GEMMs' operands
    wants: tuple[bool, bool, bool]  # a gradient for hidden, head, bias
    entropy: bool = False
    top1: bool = False


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


class _LiveRows(NamedTuple):
    """The rows to compute, on the device. `index_L` is None where these are all T rows."""

    index_L: Tensor | None
    target_L: Tensor
    weight_L: Tensor
    entropy_weight_L: Tensor | None
    policy: Policy | None
    terms_CL: Tensor
    live_L: Tensor | None  # which of these count after all; None where all do


def one_pass(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    target_T: Tensor,
    terms_CT: Tensor,
    options: Options,
    entropy_weight_T: Tensor | None = None,
    policy: Policy | None = None,
) -> PassResult:
    """parts = terms . logprob, loss = -sum(parts), and the gradients of the loss.

    A row's weight is the sum of its C terms. With `entropy_weight_T` and the option `entropy`, the
    gradients, though not the loss, are those of loss + entropy_weight . entropy. With a policy,
    whose `kl_coef_R` is on the terms' device and `logprob_3R` on hidden's, parts = terms . value
    and loss = kl - sum(parts); see `policy.py`.
    """
    T, D = hidden_TD.shape
    V = head_VD.shape[0]
    device = hidden_TD.device
    rows = _live_rows(terms_CT, entropy_weight_T, policy, target_T, V, device)
    L = rows.weight_L.numel()
    scaled, unscale = _normalise(rows, options.dtype)
    head_VD = _gemm_operand(head_VD, options.dtype)

    wants_hidden, wants_head, wants_bias = options.wants
    dhidden_TD = _allocate(wants_hidden, (T, D), hidden_TD.dtype, device, L < T)
    dhead_VD = _allocate(wants_head, (V, D), torch.float32, device, L == 0)
    dbias_V = _allocate(wants_bias, (V,), torch.float32, device, True)
    logprob_L = torch.empty(L, dtype=torch.float32, device=device)
    entropy_L = torch.empty_like(logprob_L) if options.entropy else None
    top1_L = torch.empty_like(logprob_L) if options.top1 else None

    stride = -(-V // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
    if bias_V is not None:
        bias_V = torch.nn.functional.pad(bias_V.float(), (0, stride - V))[:V]
    second_slab = (
        any(options.wants)
        and options.dtype != torch.float32
        and (device.type == "cuda" or options.backend == "triton")
    )
    chunk = _chunk_rows(L, stride, D, options, second_slab)
    logits_RS = torch.empty((chunk, stride), dtype=torch.float32, device=device)
    dlogits_RS = logits_RS
    if second_slab:
        dlogits_RS = torch.empty((chunk, stride), dtype=options.dtype, device=device)
    weighted_ce_rows = _row_function(options.backend)

    for start in range(0, L, chunk):
        stop = min(start + chunk, L)
        hidden_RD = _take(hidden_TD, rows, start, stop).to(options.dtype)
        logits_RV = logits_RS[: stop - start, :V]
        dlogits_RV = dlogits_RS[: stop - start, :V]
        gemm.project(hidden_RD, head_VD, logits_RV)
        weighted_ce_rows(
            logits_RV,
            dlogits_RV if any(options.wants) else None,
            bias_V,
            rows.target_L[start:stop],
            scaled.weight_L[start:stop],
            logprob_L[start:stop],
            options.transform,
            None if entropy_L is None else entropy_L[start:stop],
            None if scaled.entropy_weight_L is None else scaled.entropy_weight_L[start:stop],
            None if top1_L is None else top1_L[start:stop],
            None if scaled.policy is None else scaled.policy.rows(start, stop),
        )
        if dhidden_TD is not None:
            _grad_hidden(dlogits_RV, head_VD, dhidden_TD, rows.index_L, start, stop)
        if dhead_VD is not None:
            gemm.grad_head(dlogits_RV, hidden_RD, dhead_VD, accumulate=start > 0)
        if dbias_V is not None:
            dbias_V += dlogits_RV.sum(0, dtype=torch.float32)

    parts_C, kl = _sums(rows, logprob_L)
    gradients = Gradients(dhidden_TD, dhead_VD, dbias_V, unscale)
    values = (logprob_L, entropy_L, top1_L)
    values_T = (None if each is None else _all_rows(each, rows.index_L, T) for each in values)
    loss = (kl - parts_C.sum()).float()
    return PassResult(loss, parts_C.float(), kl.float(), *values_T, gradients)


def _sums(rows: _LiveRows, logprob_L: Tensor) -> tuple[Tensor, Tensor]:
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


def _live_rows(
    terms_CT: Tensor,
    entropy_weight_T: Tensor | None,
    policy: Policy | None,
    target_T: Tensor,
    V: int,
    device: torch.device,
) -> _LiveRows:
    """Terms on the CPU: dead rows are dropped here, at no cost to the device.

    Terms on a device: which rows are dead is not known without waiting for it, so all are kept,
    and the row function skips the dead.
    """
    terms_CT = terms_CT.float()
    weight_T = terms_CT.sum(0)
    live_T = weight_T != 0
    if entropy_weight_T is not None:
        entropy_weight_T = entropy_weight_T.float().contiguous()
        live_T |= entropy_weight_T != 0
    if policy is not None:
        live_T |= policy.kl_coef_R != 0
    index_L = live_L = None
    if weight_T.device.type == "cpu":
        live = live_T.nonzero().squeeze(1)
        if live.numel() < weight_T.numel():
            weight_T, terms_CT = weight_T[live], terms_CT[:, live]
            if entropy_weight_T is not None:
                entropy_weight_T = entropy_weight_T[live]
            index_L = to_device(live, device)
            if policy is not None:
                policy = policy._replace(
                    logprob_3R=policy.logprob_3R[:, index_L], kl_coef_R=policy.kl_coef_R[live]
                )
            target_T = target_T[live if target_T.device.type == "cpu" else index_L]
        if target_T.device.type == "cpu":
            check_range("target_T of the rows that count", target_T, 0, V)
    elif device.type != "cpu":
        live_L = live_T
    weight_L = to_device(weight_T, device)
    target_L = to_device(target_T, device).to(torch.int64)
    if live_L is not None:
        target_L = target_L.where(live_L, 0)
    if entropy_weight_T is not None:
        entropy_weight_T = to_device(entropy_weight_T, device)
    if policy is not None:
        policy = policy._replace(kl_coef_R=to_device(policy.kl_coef_R, device))
    terms_CL = to_device(terms_CT, device)
    return _LiveRows(index_L, target_L, weight_L, entropy_weight_T, policy, terms_CL, live_L)


def _all_rows(values_L: Tensor, index_L: Tensor | None, T: int) -> Tensor:
    """Values of all T rows, NaN in those that were dropped."""
    if index_L is None:
        return values_L
    return values_L.new_full((T,), torch.nan).index_copy_(0, index_L, values_L)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for, where there is one to make."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _normalise(rows: _LiveRows, dtype: torch.dtype) -> tuple[_LiveRows, Tensor]:
    """For float16, the weights over a power of two that brings the largest to [1/2, 1).

    Token weights of 1e-6 times probabilities of 1e-3 would underflow in float16 gradients. A
    power of two changes no other bit, and is given back when the gradients leave.
    """
    one = rows.weight_L.new_ones(())
    if dtype != torch.float16 or rows.weight_L.numel() == 0:
        return rows, one
    policy, entropy_weight_L = rows.policy, rows.entropy_weight_L
    weights = [rows.weight_L, entropy_weight_L, None if policy is None else policy.kl_coef_R]
    largest = torch.stack([each.abs().amax() for each in weights if each is not None]).amax()
    exponent = largest.frexp().exponent.clamp(-120, 120)  # 2^121 is finite
    weight_L, entropy_weight_L, kl_coef_L = (
        None if each is None else torch.ldexp(each, -exponent) for each in weights
    )
    if policy is not None:
        policy = policy._replace(kl_coef_R=kl_coef_L)
    rows = rows._replace(weight_L=weight_L, entropy_weight_L=entropy_weight_L, policy=policy)
    return rows, torch.ldexp(one, exponent)


def _gemm_operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`, copied only if it must be; GEMMs read both row and column order."""
    tensor = tensor.to(dtype)
    return tensor if 1 in tensor.stride() else tensor.contiguous()


def _allocate(
    wanted: bool, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, zero: bool
) -> Tensor | None:
    if not wanted:
        return None
    return (torch.zeros if zero else torch.empty)(shape, dtype=dtype, device=device)


def _chunk_rows(L: int, stride: int, D: int, options: Options, second_slab: bool) -> int:
    """As many rows as the workspace holds, in chunks of about one size; at least one row.

    A row costs its logits, their gradient where that is apart, and hidden and dhidden copies.
    """
    row_bytes = stride * (4 + (options.dtype.itemsize if second_slab else 0)) + 8 * D
    fits = max(1, options.workspace_bytes // row_bytes)
    chunks = max(1, -(-L // fits))
    rows = max(1, -(-L // chunks))
    # Whole GEMM tiles where that still fits.
    tiled = -(-rows // 128) * 128
    return min(tiled, max(1, L)) if tiled <= fits else rows


def _row_function(backend: str) -> Callable[..., None]:
    if backend == "triton":
        from .rowwise import weighted_ce_rows
    else:
        from .chunked_torch import weighted_ce_rows
    return weighted_ce_rows


def _take(hidden_TD: Tensor, rows: _LiveRows, start: int, stop: int) -> Tensor:
    if rows.index_L is not None:
        return hidden_TD.index_select(0, rows.index_L[start:stop])
    hidden_RD = hidden_TD[start:stop]
    if rows.live_L is not None:
        # 0 * NaN is NaN: what a dead row holds must not reach the head's gradient.
        return hidden_RD.where(rows.live_L[start:stop, None], 0)
    return hidden_RD


def _grad_hidden(
    dlogits_RV: Tensor,
    head_VD: Tensor,
    dhidden_TD: Tensor,
    index_L: Tensor | None,
    start: int,
    stop: int,
) -> None:
    if index_L is None and dhidden_TD.dtype == torch.float32:
        gemm.grad_hidden(dlogits_RV, head_VD, dhidden_TD[start:stop])
        return
    shape = (stop - start, dhidden_TD.shape[1])
    dhidden_RD = torch.empty(shape, dtype=torch.float32, device=dhidden_TD.device)
    gemm.grad_hidden(dlogits_RV, head_VD, dhidden_RD)
    if index_L is None:
        dhidden_TD[start:stop] = dhidden_RD
    else:
        dhidden_TD.index_copy_(0, index_L[start:stop], dhidden_RD.to(dhidden_TD.dtype))
