"""The loss of a micro-batch, from the coefficients of its tokens: passes over the head.

Suffixes: T rows that predict a token, C terms of the objective.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grao_fast.config import ObjectiveOptions
from grao_fast.data.packing import MicroBatch
from grao_fast.kernels import OffPolicy, PolicyLoss, linear_policy_loss
from grao_fast.models.objective import HeadInputs
from grao_fast.models.policy import Policy


def policy_loss(
    policy: Policy,
    head: HeadInputs,
    batch: MicroBatch,
    objective: ObjectiveOptions,
    *,
    old_logprob_T: Tensor | None = None,
    ref_logprob_T: Tensor | None = None,
    workspace_mib: int | None = None,
) -> PolicyLoss:
    """The loss of a micro-batch, its terms and entropies; adds the head's gradient to its `grad`.

    Args:
        old_logprob_T: under the policy that the step began with; None: `policy` itself.
        ref_logprob_T: under the policy that training began with; None: no KL term.
        workspace_mib: memory for logits; None: the device's default.
    """
    has_cap, has_kl = objective.sampler_cap is not None, ref_logprob_T is not None
    return linear_policy_loss(
        head.hidden_TD,
        head.head_VD,
        batch.target_T,
        batch.terms_CT,
        off_policy=OffPolicy(
            old_logprob_T=old_logprob_T,
            sampler_logprob_T=batch.sampler_logprob_T if has_cap else None,
            ref_logprob_T=ref_logprob_T,
            kl_coef_T=batch.kl_coef_T if has_kl else None,
            clip=None if old_logprob_T is None else objective.clip,
            sampler_cap=objective.sampler_cap,
        ),
        entropy=True,
        head_grad_VD=policy.head_grad(),
        **logit_options(policy, head, objective, workspace_mib),
    )


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
    weight_T: Tensor, logprob_T: Tensor, old_T: Tensor, clip: tuple[float, float]
) -> Tensor:
    """(T,) 1 where the ratio is clipped, 0 where not, NaN where there is none."""
    low, high = clip
    weight_T, rho_T = weight_T.to(logprob_T.device), (logprob_T - old_T).exp()
    clipped_T = ((weight_T > 0) & (rho_T > 1 + high)) | ((weight_T < 0) & (rho_T < 1 - low))
    return clipped_T.float().where(~rho_T.isnan(), torch.nan)
