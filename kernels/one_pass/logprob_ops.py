"""Log-probs and entropies as operators of torch.library: the forward pass, and the backward one.

    torch.ops.grao_fast.token_logprobs             log-probs, and entropies on request
    torch.ops.grao_fast.token_logprobs_backward    the one pass, weighted by incoming gradients

Shapes: T rows, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..devices import check_backend, without_autocast
from .derivatives import once_differentiable
from .gradients import rounded_gradients
from .loop import one_pass
from .ops import LIBRARY, NAMESPACE, operator
from .options import OPERANDS_SCHEMA, OPTIONS_SCHEMA, PassInputs, PassOptions, with_nones
from .scale import scaled_gradient


def _token_logprobs_fake(hidden_TD, *arguments):
    T, entropy = hidden_TD.shape[0], PassOptions.from_flat(arguments).entropy
    logprob_T = hidden_TD.new_empty(T, dtype=torch.float32)
    return logprob_T, hidden_TD.new_empty(T if entropy else 0, dtype=torch.float32)


@operator(
    f"token_logprobs({OPERANDS_SCHEMA}, {OPTIONS_SCHEMA}) -> (Tensor, Tensor)",
    _token_logprobs_fake,
)
def token_logprobs(
    hidden_TD: Tensor, head_VD: Tensor, bias_V: Tensor | None, target_T: Tensor, *flat_options
) -> tuple[Tensor, Tensor]:
    """logprob_T, and entropy_T, which is empty unless asked for."""
    options = PassOptions.from_flat(flat_options)
    check_backend(options.backend, hidden_TD.device)
    # Weights on the CPU tell the host that all rows count.
    ones_1T = torch.ones(1, hidden_TD.shape[0], dtype=torch.float32)
    with without_autocast(hidden_TD.device):
        result = one_pass(PassInputs(hidden_TD, head_VD, bias_V, target_T, ones_1T), options)
    entropy_T = result.logprob_T.new_empty(0) if result.entropy_T is None else result.entropy_T
    return result.logprob_T, entropy_T


def _token_logprobs_backward_fake(hidden_TD, head_VD, bias_V, *arguments):
    operands, wants = (hidden_TD, head_VD, bias_V), PassOptions.from_flat(arguments).wants
    return tuple(
        torch.empty_like(each, memory_format=torch.contiguous_format)
        if wanted
        else hidden_TD.new_empty(0)
        for each, wanted in zip(operands, wants, strict=True)
    )


@operator(
    f"token_logprobs_backward({OPERANDS_SCHEMA}, Tensor? grad_logprob_T, Tensor? grad_entropy_T, "
    f"{OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    _token_logprobs_backward_fake,
)
def token_logprobs_backward(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    target_T: Tensor,
    grad_logprob_T: Tensor | None,
    grad_entropy_T: Tensor | None,
    *flat_options,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, head and bias; empty where not wanted."""
    options = PassOptions.from_flat(flat_options)._replace(entropy=grad_entropy_T is not None)
    if grad_logprob_T is None:
        grad_logprob_T = hidden_TD.new_zeros(hidden_TD.shape[0], dtype=torch.float32)
    inputs = PassInputs(hidden_TD, head_VD, bias_V, target_T, -grad_logprob_T[None], grad_entropy_T)
    with without_autocast(hidden_TD.device):
        gradients = one_pass(inputs, options).gradients
    kept = rounded_gradients(gradients, inputs, options)
    if options.dtype != torch.float16:
        return kept
    dhidden_TD, dhead_VD, dbias_V = (
        gradient
        if operand is None
        else scaled_gradient(gradient, gradients.unscale, operand.dtype, options.backend)
        for operand, gradient in zip(inputs.operands, kept, strict=True)
    )
    return dhidden_TD, dhead_VD, dbias_V


def _save_operands(ctx, inputs, output) -> None:
    ctx.options = PassOptions.from_flat(inputs)
    if not ctx.options.entropy:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4])
    ctx.arguments = len(inputs)


@once_differentiable
def _logprob_gradients(ctx, grad_logprob_T, grad_entropy_T):
    wants = ctx.needs_input_grad[:3]
    gradients = token_logprobs_backward(
        *ctx.saved_tensors,
        grad_logprob_T,
        grad_entropy_T,
        *ctx.options._replace(wants=wants).flat(),
    )
    wanted = [each if want else None for each, want in zip(gradients, wants, strict=True)]
    return with_nones(wanted, ctx.arguments)


torch.library.register_autograd(
    f"{NAMESPACE}::token_logprobs",
    _logprob_gradients,
    setup_context=_save_operands,
    lib=LIBRARY,
)
