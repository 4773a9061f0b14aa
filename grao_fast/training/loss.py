"""The loss of a micro-batch, from the coefficients of its tokens: passes over the head.

Suffixes: T rows that predict a token, C terms of the objective.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grao_fast.config import ObjectiveOptions
from grao_fast.data.packing import MicroBatch
from grao_fast.kernels import (
    OffPolicy,
    PolicyLoss,
    Shaping,
    linear_logprobs,
    linear_policy_loss,
)
from grao_fast.kernels.devices import to_device
from grao_fast.models.objective import HeadInputs
from grao_fast.models.policy import Policy
from grao_fast.objectives import Rows, SecondPass


def policy_loss(
    policy: Policy,
    head: HeadInputs,
    batch: MicroBatch,
    objective: ObjectiveOptions,
    *,
    old_logprob_T: Tensor | None = None,
    ref_logprob_T: Tensor | None = None,
    workspace_mib: int | None = None,
) -> tuple[PolicyLoss, Tensor | None]:
    """The loss of a micro-batch, its terms and entropies; adds the head's gradient to its `grad`.

    Beside it, for each ratio to `old_logprob_T`, of a token or a sequence, 1 where its bounds hold
    it, and 0 where not; NaN where a token has none. None: there are no bounds, or no ratios.

    The gradient is that of the objective. Where this takes two passes, `loss` is only the root of
    the backward pass; the objective's own value is the sum of `terms_C`, as everywhere.

    Args:
        old_logprob_T: under the policy that the step began with; None: `policy` itself.
        ref_logprob_T: under the policy that training began with; None: not asked for.
        workspace_mib: memory for logits; None: the device's default.
    """
    formula, terms_CT, values_C, clipped = objective.formula, batch.terms_CT, None, None
    options = logit_options(policy, head, objective, workspace_mib)
    if formula.two_passes:
        known = old_logprob_T, ref_logprob_T
        terms_CT, values_C, clipped = _second_pass(head, batch, objective, known, options)
        old_logprob_T = None  # ratios are in the coefficients
    has_cap = objective.sampler_cap is not None
    has_kl = ref_logprob_T is not None and batch.kl_coef_T is not None
    found = linear_policy_loss(
        head.hidden_TD,
        head.head_VD,
        batch.target_T,
        terms_CT,
        off_policy=OffPolicy(
            old_logprob_T=old_logprob_T,
            sampler_logprob_T=batch.sampler_logprob_T if has_cap else None,
            ref_logprob_T=ref_logprob_T if has_kl else None,
            kl_coef_T=batch.kl_coef_T if has_kl else None,
            clip=None if old_logprob_T is None else objective.clip,
            sampler_cap=objective.sampler_cap,
            ratio=formula.ratio,
        ),
        shaping=_shaping(batch, objective),
        entropy=True,
        head_grad_VD=policy.head_grad(),
        **options,
    )
    if old_logprob_T is not None and objective.clip is not None:
        weight_T, known = terms_CT.sum(0), (found.logprob_T, old_logprob_T)
        clipped = clipped_ratios(weight_T, *known, objective.clip, ratio=formula.ratio)
    return (found if values_C is None else found._replace(terms_C=values_C)), clipped


def _shaping(batch: MicroBatch, objective: ObjectiveOptions) -> Shaping | None:
    """The form of the micro-batch's references; None: they have none."""
    form = objective.formula.shaping
    if form is None:
        return None
    return Shaping(form, objective.formula.shaped_rows(batch.terms_CT, batch.is_reference_T))


@torch.no_grad()
def _second_pass(
    head: HeadInputs,
    batch: MicroBatch,
    objective: ObjectiveOptions,
    known: tuple[Tensor | None, Tensor | None],
    options: dict[str, Any],
) -> SecondPass:
    """The coefficients of the second pass over the head, after the first.

    known: log-probs under the policy that the step began with, and that training began with.
    """
    found = linear_logprobs(head.hidden_TD, head.head_VD, batch.target_T, entropy=True, **options)
    assert found.entropy_T is not None, "asked for"
    old_logprob_T, ref_logprob_T = (None if each is None else each.cpu() for each in known)
    rows = Rows(
        sequence_T=batch.sequence_T,
        K=batch.K,
        logprob_T=found.logprob_T.cpu(),
        entropy_T=found.entropy_T.cpu(),
        old_logprob_T=old_logprob_T,
        ref_logprob_T=ref_logprob_T if objective.formula.needs_initial else None,
    )
    return objective.formula.second_pass(batch.terms_CT, rows)


def logit_options(
    policy: Policy, head: HeadInputs, objective: ObjectiveOptions, workspace_mib: int | None
) -> dict[str, Any]:
    """The options of a pass over the head that decide its logits, and their memory."""
    return {
        "bias_V": head.bias_V,
        "temperature": objective.temperature,
        "logit_scale": policy.transform.logit_scale,
        "softcap": policy.transform.softcap,
        "workspace_mib": workspace_mib,
    }


def clipped_ratios(
    weight_T: Tensor,
    logprob_T: Tensor,
    old_T: Tensor,
    clip: tuple[float, float],
    *,
    ratio: str = "clipped",
) -> Tensor:
    """(T,) 1 where the bounds hold the ratio, 0 where not, NaN where there is none."""
    low, high = clip
    weight_T, old_T = (to_device(each, logprob_T.device) for each in (weight_T, old_T))
    rho_T = (logprob_T - old_T).exp()
    above_T, below_T = rho_T > 1 + high, rho_T < 1 - low
    if ratio == "clipped":  # against the sign of the weight
        above_T, below_T = above_T & (weight_T > 0), below_T & (weight_T < 0)
    clipped_T = above_T | below_T
    return clipped_T.float().where(~rho_T.isnan(), torch.nan)
