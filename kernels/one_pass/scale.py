"""Scales a finished gradient and casts it to the dtype it leaves in."""

from __future__ import annotations

import torch
from torch import Tensor

_SCALE_BLOCK_BYTES = 64 * 2**20


def scaled_gradient(gradient: Tensor, scale: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """scale * gradient in `dtype`, multiplied in float32; in place if the dtype is the same."""
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    if gradient.device.type == "cpu" and out is gradient and scale.item() == 1.0:
        return gradient
    if backend == "triton":
        from ..rows.triton_rows import scale_gradient

        scale_gradient(gradient, scale, out)
    elif gradient.dtype == dtype == torch.float32:
        gradient.mul_(scale)
    elif gradient.numel() > 0:
        row_bytes = 4 * max(1, gradient[0].numel())
        block = max(1, _SCALE_BLOCK_BYTES // row_bytes)
        for piece, result in zip(gradient.split(block), out.split(block), strict=True):
            result.copy_(piece.float().mul_(scale))
    return out
