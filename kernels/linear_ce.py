"""sum_t weight_t * cross-entropy_t of a linear head, one pass, logits never whole.

Layers: the public function checks its arguments, the autograd function keeps the gradients that
`one_pass.py` has made and hands them over.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import (
    LogitTransform,
    check_constant,
    check_home,
    check_number,
    check_operands,
    compute_dtype,
    logit_transform,
    resolve_backend,
)
from .one_pass import Gradients, Options, one_pass

_SCALE_BLOCK_BYTES = 64 * 2**20


class LinearCrossEntropy(NamedTuple):
    """`loss` is differentiable; `logprob_T` is not, and is NaN in rows of weight 0."""

    loss: Tensor
    logprob_T: Tensor


def linear_weighted_cross_entropy(
    hidden_TD: Tensor,
    head_VD: Tensor,
    target_T: Tensor,
    weight_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_mib: float = 512,
    backend: str | None = None,
) -> LinearCrossEntropy:
    """loss = -sum_t weight_t log softmax(z_t)[target_t], with weights of either sign.

    z = softcap((hidden head^T + bias) * logit_scale) / temperature, softcap(x) = c tanh(x / c).
    d loss / dz = weight (softmax(z) - onehot) needs no second look at the vocabulary, so the
    gradients are made in this call, and `backward` only scales them and hands them over. Memory
    beyond the inputs: the workspace, the gradient of hidden_TD, and that of head_VD, which is
    summed in float32 whatever the dtype.

    Args:
        hidden_TD: (T, D) float32, bfloat16 or float16.
        head_VD: (V, D), the same dtype; under `torch.autocast` both are cast to its dtype.
        target_T: (T,) int64 or int32 in [0, V); any value in a row of weight 0.
        weight_T: (T,) floats, constants. On the CPU (recommended, whatever device hidden_TD is
            on) rows of weight 0 are dropped before the head and cost nothing; on a CUDA device
            they are computed and zeroed, as dropping them would make the host wait.
        bias_V: (V,) or None.
        temperature, logit_scale, softcap: of z; `softcap=None` is none.
        workspace_mib: memory for the logits of a chunk of rows and their gradient. More is
            faster, to the point where all rows fit.
        backend: "triton", "torch", or None for Triton on CUDA tensors and PyTorch on others.

    Returns:
        LinearCrossEntropy(loss, logprob_T): a 0-d float32 differentiable in hidden_TD, head_VD
        and bias_V; and (T,) float32 log-probs, constants, NaN where the weight is 0. What a row
        of weight 0 holds, NaN included, has no effect; its gradient is exactly 0.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit, by name.
        RuntimeError: a second backward pass through one loss.
    """
    check_operands(hidden_TD, head_VD, target_T, bias_V)
    T = hidden_TD.shape[0]
    if tuple(weight_T.shape) != (T,):
        raise ValueError(f"weight_T must be ({T},), got {tuple(weight_T.shape)}")
    if not weight_T.is_floating_point():
        raise ValueError(f"weight_T must be floating point, got {weight_T.dtype}")
    check_constant("weight_T", weight_T)
    check_home("weight_T", weight_T, hidden_TD)
    transform = logit_transform(temperature, logit_scale, softcap)
    backend = resolve_backend(backend, hidden_TD.device)
    loss, _, logprob_T = weighted_terms(
        hidden_TD, head_VD, bias_V, target_T, weight_T[None], transform, workspace_mib, backend
    )
    return LinearCrossEntropy(loss, logprob_T)


def weighted_terms(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    target_T: Tensor,
    terms_CT: Tensor,
    transform: LogitTransform,
    workspace_mib: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its parts (C,) = terms_CT . logprob_T with loss = -sum of parts, and logprob_T."""
    check_number("workspace_mib", workspace_mib, above=0)
    tracked = torch.is_grad_enabled()
    options = Options(
        transform=transform,
        workspace_bytes=int(workspace_mib * 2**20),
        backend=backend,
        dtype=compute_dtype(hidden_TD, head_VD),
        wants=(
            tracked and hidden_TD.requires_grad,
            tracked and head_VD.requires_grad,
            tracked and bias_V is not None and bias_V.requires_grad,
        ),
    )
    return _WeightedTerms.apply(hidden_TD, head_VD, bias_V, target_T, terms_CT, options)


class _WeightedTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, head_VD, bias_V, target_T, terms_CT, options):
        with torch.autocast(hidden_TD.device.type, enabled=False):
            result = one_pass(hidden_TD, head_VD, bias_V, target_T, terms_CT, options)
        # Kept here and not by save_for_backward, as backward gives these very buffers away.
        ctx.gradients = _in_final_dtype(result.gradients, head_VD, bias_V)
        ctx.dtypes = (hidden_TD.dtype, head_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.backend = options.backend
        ctx.mark_non_differentiable(result.parts_C, result.logprob_T)
        return result.loss, result.parts_C, result.logprob_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _grad_parts, _grad_logprob):
        gradients: Gradients | None = ctx.gradients
        if gradients is None:
            raise RuntimeError(
                "the gradients of this loss were handed over by the first backward pass; call "
                "the loss again for a second one"
            )
        ctx.gradients = None
        scale = grad_loss * gradients.unscale
        scaled = [
            None if gradient is None else _scaled(gradient, scale, dtype, ctx.backend)
            for gradient, dtype in zip(gradients[:3], ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None


def _in_final_dtype(gradients: Gradients, head_VD: Tensor, bias_V: Tensor | None) -> Gradients:
    """Rounds what was summed in float32, unless a factor is still to come.

    float16 gradients of normalised weights may lie outside of float16 until they are unscaled.
    """
    if isinstance(gradients.unscale, Tensor):
        return gradients
    head, bias = gradients.head_VD, gradients.bias_V
    return gradients._replace(
        head_VD=None if head is None else head.to(head_VD.dtype),
        bias_V=None if bias is None or bias_V is None else bias.to(bias_V.dtype),
    )


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """scale * gradient in `dtype`, multiplied in float32; in place where the dtype stays."""
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    if gradient.device.type == "cpu" and out is gradient and scale.item() == 1.0:
        return gradient
    if backend == "triton":
        from .rowwise import scale_gradient

        scale_gradient(gradient, scale, out)
    elif gradient.dtype == dtype == torch.float32:
        gradient.mul_(scale)
    elif gradient.numel() > 0:
        row_bytes = 4 * max(1, gradient[0].numel())
        block = max(1, _SCALE_BLOCK_BYTES // row_bytes)
        for piece, result in zip(gradient.split(block), out.split(block), strict=True):
            result.copy_(piece.float().mul_(scale))
    return out
