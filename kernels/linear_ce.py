"""sum_t weight_t * cross-entropy_t of a linear head, one pass, logits never whole.

Layers: the public function checks its arguments; the autograd function keeps the gradients that
the operator in `one_pass/ops.py` has made, by `one_pass/loop.py`, and hands them over.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    LogitTransform,
    check_constant,
    check_home,
    check_operands,
    choose_backend,
    compute_dtype,
    logit_transform,
    workspace_bytes,
)
from .one_pass import ops
from .one_pass.derivatives import check_transforms, once_differentiable
from .one_pass.head_grad import add_head_grad, check_head_grad, is_recomputed
from .one_pass.scale import scaled_gradient
from .vocab_parallel import Parts, VocabParallel, local_parts


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
    workspace_mib: float | None = None,
    backend: str | None = None,
    head_grad_VD: Tensor | None = None,
    vocab_parallel: VocabParallel | None = None,
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
        workspace_mib: memory for the logits of a chunk of rows and their gradient; None is 512 on
            a CPU and 2048 on others, of which it takes what the rows need. More is faster, to
            the point where all rows fit: see `one_pass/chunks.py`.
        backend: "triton", "torch", or None for Triton on CUDA tensors and PyTorch on others.
        head_grad_VD: (V, D) float32 or of head_VD's dtype, for instance `head.weight.grad` or
            Megatron's `main_grad`: this call adds d loss / d head_VD to it, and `backward` then
            gives head_VD nothing. So micro-batches need no second buffer of the head's size. It
            is added once, also where a checkpoint runs the forward pass again. The loss must be
            the last word: backward must start from it with a gradient of 1, which it
            cannot apply afterwards (the weights can hold a factor). It raises on the CPU, and
            gives NaN gradients elsewhere, if it gets another.
        vocab_parallel: head_VD and bias_V are this process's part of the vocabulary, and all else
            is the same in all processes of the group. Or, without it, head_VD is a DTensor placed
            [Shard(0)] and hidden_TD one placed [Replicate()] on the same mesh.

    Returns:
        LinearCrossEntropy(loss, logprob_T): a 0-d float32 differentiable in hidden_TD, head_VD
        and bias_V; and (T,) float32 log-probs, constants, NaN where the weight is 0. What a row
        of weight 0 holds, NaN included, has no effect; its gradient is exactly 0.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit, by name.
        RuntimeError: a second backward pass through one loss, or one with create_graph=True.
    """
    parts = local_parts(hidden_TD, head_VD, bias_V, vocab_parallel)
    hidden_TD = parts.hidden_TD
    check_operands(hidden_TD, parts.head_VD, target_T, parts.bias_V)
    T = hidden_TD.shape[0]
    if tuple(weight_T.shape) != (T,):
        raise ValueError(f"weight_T must be ({T},), got {tuple(weight_T.shape)}")
    if not weight_T.is_floating_point():
        raise ValueError(f"weight_T must be floating point, got {weight_T.dtype}: call float()")
    check_constant("weight_T", weight_T)
    check_home("weight_T", weight_T, hidden_TD)
    transform = logit_transform(temperature, logit_scale, softcap)
    backend = choose_backend(backend, hidden_TD.device)
    result = weighted_terms(
        parts, target_T, weight_T[None], transform, workspace_mib, backend, head_grad_VD
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
    parts: Parts,
    target_T: Tensor,
    terms_CT: Tensor,
    transform: LogitTransform,
    workspace_mib: float | None,
    backend: str,
    head_grad_VD: Tensor | None,
    *,
    policy_3T: Tensor | None = None,
    kl_coef_T: Tensor | None = None,
    bounds: tuple[float, float, float] = (-math.inf, math.inf, math.inf),
    entropy: bool = False,
    top1: bool = False,
) -> WeightedTerms:
    """loss = -sum of parts, parts = terms_CT . logprob_T: `ops.weighted_terms`, differentiable."""
    tracked = torch.is_grad_enabled()
    hidden_TD, head_VD, bias_V, group_name, vocab_size = parts
    check_transforms(hidden_TD, head_VD, bias_V, vmap=False)
    if head_grad_VD is not None:
        head_grad_VD = check_head_grad(head_grad_VD, head_VD)
        head_grad_VD = head_grad_VD if tracked else None
    operands = (hidden_TD, head_VD, bias_V)
    wants = [tracked and each is not None and each.requires_grad for each in operands]
    arguments = (
        target_T,
        terms_CT,
        policy_3T,
        kl_coef_T,
        list(bounds),
        *transform,
        workspace_bytes(workspace_mib, hidden_TD.device),
        backend,
        compute_dtype(hidden_TD, head_VD),
        entropy,
        top1,
        group_name,
        vocab_size,
        head_grad_VD is not None,  # a sum goes on in float32
    )
    if not torch.compiler.is_compiling():
        if head_grad_VD is not None:
            wants[1] = False
            # A checkpoint holds its arguments to their version; this sum belongs to no graph.
            head_grad_VD = head_grad_VD.data
        return WeightedTerms(*_WeightedTerms.apply(head_grad_VD, *operands, *arguments, wants))
    # A compiler may see nothing change in place, and reuses the buffers by itself.
    if head_grad_VD is None:
        return WeightedTerms(*ops.weighted_terms(*operands, *arguments, wants)[:6])
    return _accumulated_by_compiler(operands, arguments, wants, head_grad_VD)


def _accumulated_by_compiler(
    operands: tuple[Tensor, Tensor, Tensor | None],
    arguments: tuple,
    wants: list[bool],
    head_grad_VD: Tensor,
) -> WeightedTerms:
    """The operator writes to none of its inputs; what the sum costs is the compiler's to choose."""
    hidden_TD, head_VD, bias_V = operands
    wants = [wants[0], True, wants[2]]
    results = ops.weighted_terms(hidden_TD, head_VD.detach(), bias_V, *arguments, wants)
    loss, *constants, _dhidden_TD, dhead_VD, _dbias_V, unscale = results
    add_head_grad(head_grad_VD, dhead_VD.detach(), unscale.detach())
    return WeightedTerms(_LastWord.apply(loss, head_VD), *constants)


class _LastWord(torch.autograd.Function):
    """A loss from which backward must start, be the head all that asks for a gradient."""

    @staticmethod
    def forward(ctx, loss, head_VD):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_loss):
        return _must_be_one(grad_loss), None


def _must_be_one(grad_loss: Tensor) -> Tensor:
    """1; NaN, or on the CPU ValueError, if it is not: a part of the gradient is out of reach."""
    if not torch.compiler.is_compiling() and grad_loss.device.type == "cpu" and grad_loss != 1:
        raise ValueError(
            f"the head's gradient is in head_grad_VD already, as of this loss; backward came with "
            f"a gradient of {grad_loss.item():g} for it, not 1: put the factor into the weights "
            "(num_prompts divides those of linear_grao_loss), or leave out head_grad_VD"
        )
    return grad_loss.where(grad_loss == 1, math.nan)


class _WeightedTerms(torch.autograd.Function):
    """The operator, and a backward pass that scales its gradients where they are."""

    @staticmethod
    def forward(ctx, head_grad_VD, *arguments):
        if head_grad_VD is None:
            results = ops.weighted_terms(*arguments)
        else:
            adds = not is_recomputed()
            results = ops.run_weighted_terms(
                *arguments, head_grad_VD=head_grad_VD if adds else None
            )
        *outputs, dhidden_TD, dhead_VD, dbias_V, unscale = results
        # Kept here and not by save_for_backward, as backward gives these very buffers away.
        ctx.gradients = (dhidden_TD, dhead_VD, dbias_V)
        *_, backend, _dtype, _entropy, _top1, _group, _vocab_size, _keeps, wants = arguments
        ctx.unscale, ctx.backend, ctx.wants = unscale, backend, wants
        ctx.dtypes = [None if each is None else each.dtype for each in arguments[:3]]
        ctx.last_word = head_grad_VD is not None
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
        scale = (_must_be_one(grad_loss) if ctx.last_word else grad_loss) * ctx.unscale
        scaled = [
            scaled_gradient(gradient, scale, dtype, ctx.backend) if wanted else None
            for gradient, dtype, wanted in zip(gradients, ctx.dtypes, ctx.wants, strict=True)
        ]
        return None, *scaled, *[None] * 17
