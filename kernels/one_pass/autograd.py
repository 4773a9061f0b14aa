"""The pass under autograd: the forward pass makes the gradients, and backward hands them over.

Shapes: T rows, D width, V vocabulary, C terms of the loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import ops
from .derivatives import check_transforms, once_differentiable
from .head_grad import add_head_grad, check_head_grad, is_recomputed
from .options import PassInputs, PassOptions, dtypes_of, with_nones
from .scale import scaled_gradient


def differentiable_pass(
    inputs: PassInputs, options: PassOptions, head_grad_VD: Tensor | None
) -> tuple[Tensor, ...]:
    """loss, terms_C, kl, logprob_T, entropy_T and top1_T; the last two empty unless asked for.

    The loss is differentiable in the operands, the rest are constants. The head's gradient goes to
    `head_grad_VD` if that is given.
    """
    tracked = torch.is_grad_enabled()
    check_transforms(*inputs.operands, vmap=False)
    if head_grad_VD is not None:
        head_grad_VD = check_head_grad(head_grad_VD, inputs.head_VD)
        head_grad_VD = head_grad_VD if tracked else None
    hidden, head, bias = (
        tracked and each is not None and each.requires_grad for each in inputs.operands
    )
    options = options._replace(wants=(hidden, head, bias), head_float32=head_grad_VD is not None)
    if not torch.compiler.is_compiling():
        if head_grad_VD is not None:
            options = options._replace(wants=(hidden, False, bias))
            # Not part of any graph: a checkpoint would reject an argument whose version changes.
            head_grad_VD = head_grad_VD.data
        return _PolicyLoss.apply(*inputs.operands, inputs, options, head_grad_VD)
    # A compiler may not see in-place changes, and reuses the buffers by itself.
    if head_grad_VD is None:
        return ops.policy_loss(*inputs.flat(), *options.flat())[: ops.OUTPUTS]
    return _accumulated_by_compiler(inputs, options, head_grad_VD)


def _accumulated_by_compiler(
    inputs: PassInputs, options: PassOptions, head_grad_VD: Tensor
) -> tuple[Tensor, ...]:
    """The operator may not write to its inputs, so another one adds the head's gradient."""
    hidden, _, bias = options.wants
    options = options._replace(wants=(hidden, True, bias))
    head_VD = inputs.head_VD
    inputs = inputs._replace(head_VD=head_VD.detach())
    results = ops.policy_loss(*inputs.flat(), *options.flat())
    loss, *constants, _dhidden_TD, dhead_VD, _dbias_V, unscale = results
    add_head_grad(head_grad_VD, dhead_VD.detach(), unscale.detach())
    return (_FinalLoss.apply(loss, head_VD), *constants)


class _FinalLoss(torch.autograd.Function):
    """A loss from which backward must start, even if only the head requires a gradient."""

    @staticmethod
    def forward(ctx, loss, head_VD):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_loss):
        return _must_be_one(grad_loss), None


def _must_be_one(grad_loss: Tensor) -> Tensor:
    """1; or, for any other gradient, NaN, and on the CPU ValueError.

    The head's gradient has left already and cannot be scaled any more.
    """
    if not torch.compiler.is_compiling() and grad_loss.device.type == "cpu" and grad_loss != 1:
        raise ValueError(
            "head_grad_VD already holds the head's gradient of this loss, but backward arrived "
            f"with a gradient of {grad_loss.item():g} for it, not 1: put the factor into the "
            "weights (linear_grao_loss divides them by num_prompts), or leave out head_grad_VD"
        )
    return grad_loss.where(grad_loss == 1, math.nan)


class _PolicyLoss(torch.autograd.Function):
    """The operator, and a backward pass that scales its gradients in place."""

    @staticmethod
    def forward(ctx, hidden_TD, head_VD, bias_V, inputs, options, head_grad_VD):
        if head_grad_VD is None:
            results = ops.policy_loss(*inputs.flat(), *options.flat())
        else:
            adds = not is_recomputed()
            results = ops.run_policy_loss(inputs, options, head_grad_VD if adds else None)
        *outputs, dhidden_TD, dhead_VD, dbias_V, unscale = results
        # Not by save_for_backward, as backward gives these very buffers away.
        ctx.gradients = (dhidden_TD, dhead_VD, dbias_V)
        ctx.unscale, ctx.backend, ctx.wants = unscale, options.backend, options.wants
        ctx.dtypes = dtypes_of((hidden_TD, head_VD, bias_V))
        ctx.final = head_grad_VD is not None
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_grad_constants):
        gradients: tuple[Tensor, ...] | None = ctx.gradients
        if gradients is None:
            raise RuntimeError(
                "the first backward pass through this loss took its gradients; call the loss "
                "again for a second one"
            )
        ctx.gradients = None
        scale = (_must_be_one(grad_loss) if ctx.final else grad_loss) * ctx.unscale
        scaled = [
            scaled_gradient(gradient, scale, dtype, ctx.backend) if wanted else None
            for gradient, dtype, wanted in zip(gradients, ctx.dtypes, ctx.wants, strict=True)
        ]
        return with_nones(scaled, 6)
