"""The one pass as operators of torch.library: opaque to compilers, with shapes and gradients known.

    torch.ops.grao_fast.weighted_terms    the pass: loss, its parts, log-probs, and gradients
    torch.ops.grao_fast.grao_terms        rewards to each row's coefficients

They are what the public functions are made of. An operator runs as it is under `torch.compile`, so
that values keep their bits, and what depends on values (which rows are dropped, what an index
tensor on the CPU may hold) stays inside. They write to none of their inputs and outputs, backward
included: a compiler may reuse the buffers, as `linear_ce.py` does in eager mode.

Shapes: T rows, D width, V vocabulary, C terms of the loss, N prompts, K sequences of each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from ..advantage import (
    advantages_and_terms,
    check_finite_rewards,
    row_coefficients,
    sample_shares,
)
from ..checks import LogitTransform, check_backend, check_range, without_autocast
from ..rows.off_policy import Policy
from ..vocab_parallel import shard_of
from .derivatives import once_differentiable
from .live_rows import to_device
from .loop import Gradients, Options, one_pass

LIBRARY = torch.library.Library("grao_fast", "FRAGMENT")


def operator(fake: Callable, *, name: str | None = None) -> Callable[[Callable], Callable]:
    """Registers a function as torch.ops.grao_fast.<its name>, with `fake` for its shapes.

    As `torch.library.custom_op` does, whose first call would import the compiler: 1.3 s. The
    operator does not have the function's keyword-only parameters.
    """

    def register(function: Callable) -> Callable:
        op_name = name or function.__name__
        LIBRARY.define(op_name + _schema(function), tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(op_name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"grao_fast::{op_name}", fake, lib=LIBRARY)
        return getattr(torch.ops.grao_fast, op_name).default

    return register


def _schema(function: Callable) -> str:
    signature = inspect.signature(function)
    shown = [each for each in signature.parameters.values() if each.kind != each.KEYWORD_ONLY]
    function.__signature__ = signature.replace(parameters=shown)
    try:
        return torch.library.infer_schema(function, mutates_args=())
    finally:
        del function.__signature__


def _kept_dtype(operand: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Of a gradient that was summed in float32: the operand's, unless a factor is still to come.

    float16 gradients of normalised weights may lie outside of float16 until they are unscaled.
    """
    return torch.float32 if dtype == torch.float16 else operand.dtype


def _weighted_terms_fake(
    hidden_TD,
    head_VD,
    bias_V,
    target_T,
    terms_CT,
    policy_3T,
    kl_coef_T,
    bounds,
    slope,
    inner,
    cap,
    workspace_bytes,
    backend,
    dtype,
    entropy,
    top1,
    group_name,
    vocab_size,
    head_grad_float32,
    wants,
):
    def empty(wanted, shape, kept):
        return hidden_TD.new_empty(shape, dtype=kept) if wanted else hidden_TD.new_empty(0)

    T = hidden_TD.shape[:1]
    return (
        empty(True, (), torch.float32),
        empty(True, terms_CT.shape[:1], torch.float32),
        empty(True, (), torch.float32),
        empty(True, T, torch.float32),
        empty(entropy, T, torch.float32),
        empty(top1, T, torch.float32),
        empty(wants[0], hidden_TD.shape, hidden_TD.dtype),
        empty(
            wants[1],
            head_VD.shape,
            torch.float32 if head_grad_float32 else _kept_dtype(head_VD, dtype),
        ),
        empty(wants[2], head_VD.shape[:1], None if bias_V is None else _kept_dtype(bias_V, dtype)),
        empty(True, (), torch.float32),
    )


def run_weighted_terms(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    target_T: Tensor,
    terms_CT: Tensor,
    policy_3T: Tensor | None,
    kl_coef_T: Tensor | None,
    bounds: list[float],
    slope: float,
    inner: float,
    cap: float | None,
    workspace_bytes: int,
    backend: str,
    dtype: torch.dtype,
    entropy: bool,
    top1: bool,
    group_name: str | None,
    vocab_size: int,
    head_grad_float32: bool,
    wants: list[bool],
    *,
    head_grad_VD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, parts_C, kl, logprob_T, entropy_T, top1_T, the gradients of hidden, head and bias, and
    what multiplies these.

    What is not asked for, a gradient that is not among `wants`, is empty. `policy_3T` and
    `kl_coef_T` come together, or neither; `bounds` are low, high and cap of `Policy`. With
    a group's name, head and bias are this process's part of `vocab_size`. The head's gradient is in
    its own dtype, or with `head_grad_float32` in float32, for a sum that goes on. Only the
    function, not the operator, takes `head_grad_VD`, to which it adds that gradient.
    """
    check_backend(backend, hidden_TD.device)
    options = Options(
        transform=LogitTransform(slope, inner, cap),
        workspace_bytes=workspace_bytes,
        backend=backend,
        dtype=dtype,
        wants=(wants[0], wants[1], wants[2]),
        entropy=entropy,
        top1=top1,
        shard=shard_of(group_name, vocab_size),
    )
    policy = None
    if policy_3T is not None and kl_coef_T is not None:
        policy_3T = to_device(policy_3T, hidden_TD.device).contiguous()
        policy = Policy(policy_3T, kl_coef_T.contiguous(), *bounds)
    with without_autocast(hidden_TD.device):
        *outputs, gradients = one_pass(
            hidden_TD,
            head_VD,
            bias_V,
            target_T,
            terms_CT,
            options,
            policy=policy,
            head_grad_VD=head_grad_VD,
        )
    loss, parts_C, kl, *values_T = outputs
    values_T = (hidden_TD.new_empty(0) if each is None else each for each in values_T)
    dgradients = rounded_gradients(
        gradients, (hidden_TD, head_VD, bias_V), dtype, head_float32=head_grad_float32
    )
    return loss, parts_C, kl, *values_T, *dgradients, gradients.unscale


weighted_terms = operator(_weighted_terms_fake, name="weighted_terms")(run_weighted_terms)


def rounded_gradients(
    gradients: Gradients,
    operands: tuple[Tensor, Tensor, Tensor | None],
    dtype: torch.dtype,
    *,
    head_float32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of hidden, head and bias, in the dtype in which they are kept; empty where not wanted."""
    hidden_TD, head_VD, bias_V = operands
    nothing = hidden_TD.new_empty
    dhidden_TD, dhead_VD, dbias_V, _ = gradients
    if dhead_VD is not None and not head_float32:
        dhead_VD = dhead_VD.to(_kept_dtype(head_VD, dtype))
    if dbias_V is not None and bias_V is not None:
        dbias_V = dbias_V.to(_kept_dtype(bias_V, dtype))
    return (
        nothing(0) if dhidden_TD is None else dhidden_TD,
        nothing(0) if dhead_VD is None else dhead_VD,
        nothing(0) if dbias_V is None else dbias_V,
    )


def _save_gradients(ctx, inputs, output) -> None:
    hidden_TD, head_VD, bias_V, *_, wants = inputs
    ctx.mark_non_differentiable(*output[1:])
    # Nothing the size of the head is filled with zeros to say that its gradient has none.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[6:])
    ctx.wants = wants
    ctx.dtypes = [None if each is None else each.dtype for each in (hidden_TD, head_VD, bias_V)]


@once_differentiable
def _scale_gradients(ctx, grad_loss, *_grad_constants):
    *gradients, unscale = ctx.saved_tensors
    scale = grad_loss * unscale
    scaled = [
        (gradient.float() * scale).to(dtype) if wanted else None
        for gradient, dtype, wanted in zip(gradients, ctx.dtypes, ctx.wants, strict=True)
    ]
    return *scaled, *[None] * 17


torch.library.register_autograd(
    "grao_fast::weighted_terms",
    _scale_gradients,
    setup_context=_save_gradients,
    lib=LIBRARY,
)


def _grao_terms_fake(
    rewards_NK,
    sequence_T,
    beta,
    lam,
    statistics,
    reference_advantage,
    num_prompts,
    kl_coef,
    backend,
):
    kept = torch.float64 if rewards_NK.dtype == torch.float64 else torch.float32
    T = sequence_T.shape[0]
    return (
        torch.empty_like(rewards_NK, dtype=kept),
        rewards_NK.new_empty((3, T), dtype=torch.float32),
        rewards_NK.new_empty(T, dtype=torch.float32),
    )


@operator(_grao_terms_fake)
def grao_terms(
    rewards_NK: Tensor,
    sequence_T: Tensor,
    beta: float,
    lam: float,
    statistics: str,
    reference_advantage: str,
    num_prompts: float | None,
    kl_coef: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages (N, K), each row's coefficients (3, T) of the terms of J, and of the KL, (T,)."""
    check_finite_rewards("rewards_NK", rewards_NK)
    if sequence_T.device.type == "cpu":
        check_range("sequence_T", sequence_T, -1, rewards_NK.numel())
    if num_prompts is None:
        num_prompts = max(1, rewards_NK.shape[0])
    advantages_NK, terms_3NK = advantages_and_terms(
        rewards_NK,
        statistics=statistics,
        reference_advantage=reference_advantage,
        beta=beta,
        lam=lam,
        backend=backend,
    )
    terms_3T = row_coefficients(terms_3NK, sequence_T, num_prompts)
    if kl_coef == 0:
        return advantages_NK, terms_3T, terms_3T.new_zeros(sequence_T.shape[0])
    shares_1NK = kl_coef * sample_shares(rewards_NK)[None]
    return advantages_NK, terms_3T, row_coefficients(shares_1NK, sequence_T, num_prompts)[0]
