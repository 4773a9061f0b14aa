"""The pass as operators of torch.library: opaque to compilers, with shapes and gradients known.

    torch.ops.grao_fast.policy_loss    the pass: loss, terms, log-probs and gradients
    torch.ops.grao_fast.grao_terms     from rewards to each row's coefficients

The public functions call these. An operator runs as it is under `torch.compile`, so that values
keep their bits, and everything that depends on values (which rows are dropped, the range of an
index tensor on the CPU) stays inside. Operators, backward included, write to none of their inputs
and outputs: a compiler may reuse the buffers, as `autograd.py` does in eager mode.

Shapes: T rows, D width, V vocabulary, C terms of the loss, N prompts, K sequences of each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..advantage import (
    advantages_and_terms,
    check_finite_rewards,
    row_coefficients,
    sample_shares,
)
from ..checks import check_range
from ..devices import check_backend, to_device, without_autocast
from .derivatives import once_differentiable
from .gradients import kept_dtype, rounded_gradients
from .loop import one_pass
from .options import (
    OPERANDS_SCHEMA,
    OPTIONS_SCHEMA,
    TERMS_SCHEMA,
    PassInputs,
    PassOptions,
    dtypes_of,
    with_nones,
)

# Of the outermost package: another copy of these kernels, as from a hub, may be loaded beside them.
NAMESPACE = __name__.partition(".")[0]
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
OPERATORS = getattr(torch.ops, NAMESPACE)
OUTPUTS = 6  # of the pass: loss, terms_C, kl, logprob_T, entropy_T, top1_T; gradients follow


def operator(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Registers a function as the operator that `schema` declares; `fake` gives its shapes.

    It does what `torch.library.custom_op` does, whose first call imports the compiler: 1.3 s.
    """
    name = schema.partition("(")[0]

    def register(function: Callable) -> Callable:
        LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
        return getattr(OPERATORS, name).default

    return register


def _policy_loss_fake(*arguments):
    inputs, options = PassInputs.from_flat(arguments), PassOptions.from_flat(arguments)
    hidden_TD, head_VD, bias_V = inputs.operands
    wants_hidden, wants_head, wants_bias = options.wants

    def empty(shape, dtype=torch.float32, wanted=True):
        return hidden_TD.new_empty(shape, dtype=dtype) if wanted else hidden_TD.new_empty(0)

    T = hidden_TD.shape[:1]
    head_dtype = torch.float32 if options.head_float32 else kept_dtype(head_VD, options.dtype)
    bias_dtype = None if bias_V is None else kept_dtype(bias_V, options.dtype)
    return (
        empty(()),
        empty(inputs.terms_CT.shape[:1]),
        empty(()),
        empty(T),
        empty(T, wanted=options.entropy),
        empty(T, wanted=options.top1),
        empty(hidden_TD.shape, hidden_TD.dtype, wants_hidden),
        empty(head_VD.shape, head_dtype, wants_head),
        empty(head_VD.shape[:1], bias_dtype, wants_bias),
        empty(()),
    )


def run_policy_loss(
    inputs: PassInputs, options: PassOptions, head_grad_VD: Tensor | None = None
) -> tuple[Tensor, ...]:
    """loss, terms_C, kl, logprob_T, entropy_T, top1_T, gradients of hidden, head, bias, unscale.

    What is not asked for is empty. Gradients are still to be multiplied by `unscale`. The operator
    cannot take `head_grad_VD`, to which the head's gradient is added.
    """
    device = inputs.hidden_TD.device
    check_backend(options.backend, device)
    if inputs.forms is not None:
        forms = inputs.forms._replace(
            constants_PR=to_device(inputs.forms.constants_PR, device).contiguous(),
            kl_coef_R=inputs.forms.kl_coef_R.contiguous(),
        )
        inputs = inputs._replace(forms=forms)
    with without_autocast(device):
        *outputs, gradients = one_pass(inputs, options, head_grad_VD)
    outputs = (inputs.hidden_TD.new_empty(0) if each is None else each for each in outputs)
    return *outputs, *rounded_gradients(gradients, inputs, options), gradients.unscale


@operator(
    f"policy_loss({OPERANDS_SCHEMA}, {TERMS_SCHEMA}, {OPTIONS_SCHEMA}) -> "
    f"({', '.join(['Tensor'] * (OUTPUTS + 4))})",
    _policy_loss_fake,
)
def policy_loss(*arguments):
    return run_policy_loss(PassInputs.from_flat(arguments), PassOptions.from_flat(arguments))


def _save_gradients(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    # Without this, autograd would fill a buffer of the head's size with zeros for its gradient.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[OUTPUTS:])
    ctx.wants = PassOptions.from_flat(inputs).wants
    ctx.dtypes = dtypes_of(PassInputs.from_flat(inputs).operands)
    ctx.arguments = len(inputs)


@once_differentiable
def _scale_gradients(ctx, grad_loss, *_grad_constants):
    *gradients, unscale = ctx.saved_tensors
    scale = grad_loss * unscale
    scaled = [
        (gradient.float() * scale).to(dtype) if wanted else None
        for gradient, dtype, wanted in zip(gradients, ctx.dtypes, ctx.wants, strict=True)
    ]
    return with_nones(scaled, ctx.arguments)


torch.library.register_autograd(
    f"{NAMESPACE}::policy_loss", _scale_gradients, setup_context=_save_gradients, lib=LIBRARY
)


def _grao_terms_fake(rewards_NK, sequence_T, *_options):
    kept = torch.float64 if rewards_NK.dtype == torch.float64 else torch.float32
    T = sequence_T.shape[0]
    return (
        torch.empty_like(rewards_NK, dtype=kept),
        rewards_NK.new_empty((3, T), dtype=torch.float32),
        rewards_NK.new_empty(T, dtype=torch.float32),
    )


@operator(
    "grao_terms(Tensor rewards_NK, Tensor sequence_T, float beta, float lam, str statistics, "
    "str reference_advantage, float? num_prompts, float kl_coef) -> (Tensor, Tensor, Tensor)",
    _grao_terms_fake,
)
def grao_terms(
    rewards_NK: Tensor,
    sequence_T: Tensor,
    beta: float,
    lam: float,
    statistics: str,
    reference_advantage: str,
    num_prompts: float | None,
    kl_coef: float,
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
    )
    terms_3T = row_coefficients(terms_3NK, sequence_T, num_prompts)
    if kl_coef == 0:
        return advantages_NK, terms_3T, terms_3T.new_zeros(sequence_T.shape[0])
    shares_1NK = kl_coef * sample_shares(rewards_NK)[None]
    return advantages_NK, terms_3T, row_coefficients(shares_1NK, sequence_T, num_prompts)[0]
