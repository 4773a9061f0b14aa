"""Log-probs and entropies as operators of torch.library: the forward pass, and the backward one.

    torch.ops.grao_fast.token_logprobs             log-probs, and entropies where asked for
    torch.ops.grao_fast.token_logprobs_backward    their gradients: the one pass, with what comes in

Shapes: T rows, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import LogitTransform, check_backend, without_autocast
from ..vocab_parallel import shard_of
from .derivatives import once_differentiable
from .loop import Options, one_pass
from .ops import LIBRARY, operator, rounded_gradients
from .scale import scaled_gradient


def _token_logprobs_fake(
    hidden_TD,
    head_VD,
    bias_V,
    target_T,
    slope,
    inner,
    cap,
    workspace_bytes,
    backend,
    dtype,
    entropy,
    group_name,
    vocab_size,
):
    T = hidden_TD.shape[0]
    logprob_T = hidden_TD.new_empty(T, dtype=torch.float32)
    return logprob_T, hidden_TD.new_empty(T if entropy else 0, dtype=torch.float32)


@operator(_token_logprobs_fake)
def token_logprobs(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    target_T: Tensor,
    slope: float,
    inner: float,
    cap: float | None,
    workspace_bytes: int,
    backend: str,
    dtype: torch.dtype,
    entropy: bool,
    group_name: str | None,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """logprob_T and entropy_T, which is empty where it is not asked for."""
    check_backend(backend, hidden_TD.device)
    options = Options(
        transform=LogitTransform(slope, inner, cap),
        workspace_bytes=workspace_bytes,
        backend=backend,
        dtype=dtype,
        wants=(False, False, False),
        entropy=entropy,
        shard=shard_of(group_name, vocab_size),
    )
    # Weights on the CPU: all rows count, and the host knows it.
    ones_1T = torch.ones(1, hidden_TD.shape[0], dtype=torch.float32)
    with without_autocast(hidden_TD.device):
        result = one_pass(hidden_TD, head_VD, bias_V, target_T, ones_1T, options)
    entropy_T = result.logprob_T.new_empty(0) if result.entropy_T is None else result.entropy_T
    return result.logprob_T, entropy_T


def _token_logprobs_backward_fake(
    hidden_TD,
    head_VD,
    bias_V,
    target_T,
    grad_logprob_T,
    grad_entropy_T,
    slope,
    inner,
    cap,
    workspace_bytes,
    backend,
    dtype,
    group_name,
    vocab_size,
    wants,
):
    operands = (hidden_TD, head_VD, bias_V)
    return tuple(
        torch.empty_like(each, memory_format=torch.contiguous_format)
        if wanted
        else hidden_TD.new_empty(0)
        for each, wanted in zip(operands, wants, strict=True)
    )


@operator(_token_logprobs_backward_fake)
def token_logprobs_backward(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    target_T: Tensor,
    grad_logprob_T: Tensor | None,
    grad_entropy_T: Tensor | None,
    slope: float,
    inner: float,
    cap: float | None,
    workspace_bytes: int,
    backend: str,
    dtype: torch.dtype,
    group_name: str | None,
    vocab_size: int,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, head and bias; empty where not wanted."""
    options = Options(
        transform=LogitTransform(slope, inner, cap),
        workspace_bytes=workspace_bytes,
        backend=backend,
        dtype=dtype,
        wants=(wants[0], wants[1], wants[2]),
        entropy=grad_entropy_T is not None,
        shard=shard_of(group_name, vocab_size),
    )
    if grad_logprob_T is None:
        grad_logprob_T = hidden_TD.new_zeros(hidden_TD.shape[0], dtype=torch.float32)
    terms_1T = -grad_logprob_T[None]
    with without_autocast(hidden_TD.device):
        gradients = one_pass(
            hidden_TD, head_VD, bias_V, target_T, terms_1T, options, grad_entropy_T
        ).gradients
    operands = (hidden_TD, head_VD, bias_V)
    kept = rounded_gradients(gradients, operands, dtype)
    if dtype != torch.float16:
        return kept
    dhidden_TD, dhead_VD, dbias_V = (
        gradient
        if operand is None
        else scaled_gradient(gradient, gradients.unscale, operand.dtype, backend)
        for operand, gradient in zip(operands, kept, strict=True)
    )
    return dhidden_TD, dhead_VD, dbias_V


def _save_operands(ctx, inputs, output) -> None:
    hidden_TD, head_VD, bias_V, target_T, *options, entropy, group_name, vocab_size = inputs
    if not entropy:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_TD, head_VD, bias_V, target_T)
    ctx.options = (*options, group_name, vocab_size)


@once_differentiable
def _logprob_gradients(ctx, grad_logprob_T, grad_entropy_T):
    wants = list(ctx.needs_input_grad[:3])
    gradients = token_logprobs_backward(
        *ctx.saved_tensors, grad_logprob_T, grad_entropy_T, *ctx.options, wants
    )
    wanted = [each if want else None for each, want in zip(gradients, wants, strict=True)]
    return *wanted, *[None] * 10


torch.library.register_autograd(
    "grao_fast::token_logprobs", _logprob_gradients, setup_context=_save_operands, lib=LIBRARY
)
