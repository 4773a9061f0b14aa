"""The gradients of hidden states, head and bias, summed over the chunks of the pass.

Shapes: T rows, L live ones, R of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import gemm
from .gemm import Targets
from .live_rows import LiveRows
from .options import PassInputs, PassOptions


class Gradients(NamedTuple):
    """Gradients of the loss, each multiplied by 1 / `unscale`; None where not wanted."""

    hidden_TD: Tensor | None
    head_VD: Tensor | None
    bias_V: Tensor | None
    unscale: Tensor  # 0-d float32


class Chunk(NamedTuple):
    """A chunk of rows behind the row function, before the gradients' GEMMs."""

    start: int
    stop: int
    hidden_RD: Tensor  # in the GEMMs' dtype
    dlogits_RV: Tensor
    targets: Targets


class GradientSums(NamedTuple):
    """Buffers of the gradients; None where not wanted. `head_grad_VD` is the caller's."""

    gradients: Gradients
    head_grad_VD: Tensor | None
    index_L: Tensor | None

    @property
    def wanted(self) -> bool:
        return any(each is not None for each in (*self.gradients[:3], self.head_grad_VD))

    def add(self, chunk: Chunk, head_VD: Tensor, options: PassOptions) -> None:
        """Carry a chunk's dlogits to hidden states, head and bias."""
        dhidden_TD, dhead_VD, dbias_V, unscale = self.gradients
        _start, _stop, hidden_RD, dlogits_RV, targets = chunk
        if dhidden_TD is not None:
            dhidden_RD = self._dhidden_of(chunk, dhidden_TD)
            gemm.grad_hidden(dlogits_RV, head_VD, dhidden_RD, targets)
            if options.shard is not None:
                options.shard.sum_(dhidden_RD)
            self._store(dhidden_RD, chunk, dhidden_TD)
        if dhead_VD is not None:
            first = chunk.start == 0
            gemm.grad_head(dlogits_RV, hidden_RD, dhead_VD, targets, accumulate=not first)
        if self.head_grad_VD is not None:
            scale = unscale if options.dtype == torch.float16 else None
            gemm.grad_head(
                dlogits_RV, hidden_RD, self.head_grad_VD, targets, accumulate=True, scale=scale
            )
        if dbias_V is not None:
            dbias_V += dlogits_RV.sum(0, dtype=torch.float32)
            gemm.add_rows(dbias_V, targets.index_R, targets.grad_R)

    def _dhidden_of(self, chunk: Chunk, dhidden_TD: Tensor) -> Tensor:
        """A float32 buffer for a chunk of dhidden: dhidden itself if it can be."""
        if self.index_L is None and dhidden_TD.dtype == torch.float32:
            return dhidden_TD[chunk.start : chunk.stop]
        shape = (chunk.stop - chunk.start, dhidden_TD.shape[1])
        return torch.empty(shape, dtype=torch.float32, device=dhidden_TD.device)

    def _store(self, dhidden_RD: Tensor, chunk: Chunk, dhidden_TD: Tensor) -> None:
        start, stop = chunk.start, chunk.stop
        if self.index_L is not None:
            dhidden_RD = dhidden_RD.to(dhidden_TD.dtype)
            dhidden_TD.index_copy_(0, self.index_L[start:stop], dhidden_RD)
        elif dhidden_TD.dtype != torch.float32:
            dhidden_TD[start:stop] = dhidden_RD


def allocate_gradients(
    inputs: PassInputs,
    options: PassOptions,
    live: LiveRows,
    unscale: Tensor,
    head_grad_VD: Tensor | None,
) -> GradientSums:
    """Buffers of the wanted gradients: zeros where no chunk writes all of them, else empty."""
    hidden_TD, head_VD, _ = inputs.operands
    T, L, V = len(hidden_TD), live.row.weight_R.numel(), len(head_VD)
    device = hidden_TD.device
    wants_hidden, wants_head, wants_bias = options.wants
    dhidden_TD = dhead_VD = dbias_V = None
    if wants_hidden:
        allocate = torch.zeros if L < T else torch.empty
        dhidden_TD = allocate(hidden_TD.shape, dtype=hidden_TD.dtype, device=device)
    if wants_head:
        allocate = torch.zeros if L == 0 else torch.empty
        dhead_VD = allocate(head_VD.shape, dtype=torch.float32, device=device)
    if wants_bias:
        dbias_V = torch.zeros(V, dtype=torch.float32, device=device)
    gradients = Gradients(dhidden_TD, dhead_VD, dbias_V, unscale)
    return GradientSums(gradients, head_grad_VD, live.index_L)


def rounded_gradients(
    gradients: Gradients, inputs: PassInputs, options: PassOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, head and bias in the dtypes they are kept in; empty where not wanted."""
    nothing = inputs.hidden_TD.new_empty
    dhidden_TD, dhead_VD, dbias_V, _ = gradients
    if dhead_VD is not None and not options.head_float32:
        dhead_VD = dhead_VD.to(kept_dtype(inputs.head_VD, options.dtype))
    if dbias_V is not None and inputs.bias_V is not None:
        dbias_V = dbias_V.to(kept_dtype(inputs.bias_V, options.dtype))
    return (
        nothing(0) if dhidden_TD is None else dhidden_TD,
        nothing(0) if dhead_VD is None else dhead_VD,
        nothing(0) if dbias_V is None else dbias_V,
    )


def kept_dtype(operand: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient waits for backward, having been summed in float32.

    That is the operand's, except under float16, where gradients of normalised weights may lie
    outside of float16 until they are unscaled.
    """
    return torch.float32 if dtype == torch.float16 else operand.dtype
