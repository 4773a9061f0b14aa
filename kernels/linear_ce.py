"""sum_t weight_t * cross-entropy_t of a linear head, one pass, logits never whole.

Layers: the public function checks its arguments; the autograd function keeps the gradients that
the operator in `ops.py` has made, by `one_pass.py`, and hands them over.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops
from .checks import (
    LogitTransform,
    check_constant,
    check_home,
    check_number,
    check_operands,
    choose_backend,
    compute_dtype,
    logit_transform,
)
from .scale import scaled_gradient


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
    backend = choose_backend(backend, hidden_TD.device)
    result = weighted_terms(
        hidden_TD, head_VD, bias_V, target_T, weight_T[None], transform, workspace_mib, backend
    )
    return LinearCrossEntropy(result.loss, result.logprob_T)


class WeightedTerms(NamedTuple):
    """`loss` is differentiable, the rest are constants; what was not asked for is empty."""

    loss: Tensor
    parts_C: Tensor
    kl: Tensor
    logprob_T: Tensor
    entropy_T: Tensor
    top1_T: Tensor


def weighted_terms(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    target_T: Tensor,
    terms_CT: Tensor,
    transform: LogitTransform,
    workspace_mib: float,
    backend: str,
    *,
    policy_3T: Tensor | None = None,
    kl_coef_T: Tensor | None = None,
    bounds: tuple[float, float, float] = (-math.inf, math.inf, math.inf),
    entropy: bool = False,
    top1: bool = False,
) -> WeightedTerms:
    """loss = -sum of parts, parts = terms_CT . logprob_T: `ops.weighted_terms`, differentiable."""
    check_number("workspace_mib", workspace_mib, above=0)
    tracked = torch.is_grad_enabled()
    operands = (hidden_TD, head_VD, bias_V)
    arguments = (
        *operands,
        target_T,
        terms_CT,
        policy_3T,
        kl_coef_T,
        list(bounds),
        *transform,
        int(workspace_mib * 2**20),
        backend,
        compute_dtype(hidden_TD, head_VD),
        entropy,
        top1,
        [tracked and each is not None and each.requires_grad for each in operands],
    )
    # A compiler may see nothing change in place, and reuses the buffers by itself.
    run = ops.weighted_terms if torch.compiler.is_compiling() else _WeightedTerms.apply
    return WeightedTerms(*run(*arguments)[:6])


class _WeightedTerms(torch.autograd.Function):
    """The operator, and a backward pass that scales its gradients where they are."""

    @staticmethod
    def forward(ctx, *arguments):
        *outputs, dhidden_TD, dhead_VD, dbias_V, unscale = ops.weighted_terms(*arguments)
        *_, backend, _dtype, _entropy, _top1, wants = arguments
        # Kept here and not by save_for_backward, as backward gives these very buffers away.
        ctx.gradients = (dhidden_TD, dhead_VD, dbias_V)
        ctx.unscale, ctx.backend, ctx.wants = unscale, backend, wants
        ctx.dtypes = [None if each is None else each.dtype for each in arguments[:3]]
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_grad_constants):
        gradients: tuple[Tensor, ...] | None = ctx.gradients
        if gradients is None:
            raise RuntimeError(
                "the gradients of this loss were handed over by the first backward pass; call "
                "the loss again for a second one"
            )
        ctx.gradients = None
        scale = grad_loss * ctx.unscale
        scaled = [
            scaled_gradient(gradient, scale, dtype, ctx.backend) if wanted else None
            for gradient, dtype, wanted in zip(gradients, ctx.dtypes, ctx.wants, strict=True)
        ]
        return *scaled, *[None] * 14
