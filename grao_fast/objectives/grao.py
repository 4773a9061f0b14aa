"""GRAO's loss of a micro-batch (arXiv 2508.07750, equations 2-4).

    loss = -sum_t c_t log pi_t        c_t = w_s / (|s| * prompts)

w_s follows from the rewards of a group alone, so every coefficient is known before the head runs;
see `grao_fast.kernels.reference` for the formulas.

Suffixes: N prompts, K sequences of a prompt, the reference last, T rows that predict a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grao_fast.config import ObjectiveOptions
from grao_fast.data.packing import MicroBatch
from grao_fast.kernels import GRAOLoss, group_advantages, linear_grao_loss, sequence_weights
from grao_fast.models.objective import HeadInputs
from grao_fast.models.policy import Policy


def advantages(rewards_NK: Tensor, objective: ObjectiveOptions) -> Tensor:
    """advantages_NK of rewards; NaN where a sequence is absent."""
    return group_advantages(
        rewards_NK,
        statistics=objective.statistics,
        reference_advantage=objective.reference_advantage,
    )


def live_sequences(
    rewards_NK: Tensor, advantages_NK: Tensor, objective: ObjectiveOptions
) -> Tensor:
    """live_NK, True where a sequence has a weight, or as a sample has a KL term."""
    live_NK = sequence_weights(advantages_NK, beta=objective.beta, lam=objective.lam) != 0
    if objective.kl_coef:
        live_NK[:, :-1] |= ~rewards_NK[:, :-1].isnan()
    return live_NK


def grao_loss(
    policy: Policy,
    head: HeadInputs,
    batch: MicroBatch,
    objective: ObjectiveOptions,
    *,
    num_prompts: int,
    old_logprob_T: Tensor | None = None,
    ref_logprob_T: Tensor | None = None,
    workspace_mib: int | None = None,
) -> GRAOLoss:
    """GRAO's loss of a micro-batch, and its entropies; adds the head's gradient to its `grad`.

    Args:
        num_prompts: prompts of the whole step, dead groups included.
        old_logprob_T: under the policy that the step began with; None: `policy` itself.
        ref_logprob_T: under the policy that training began with; None: no KL term.
        workspace_mib: memory for logits; None: the device's default.
    """
    sampler_cap = objective.sampler_cap
    return linear_grao_loss(
        head.hidden_TD,
        head.head_VD,
        batch.target_T,
        batch.sequence_T,
        batch.rewards_NK,
        beta=objective.beta,
        lam=objective.lam,
        statistics=objective.statistics,
        reference_advantage=objective.reference_advantage,
        bias_V=head.bias_V,
        temperature=objective.temperature,
        logit_scale=policy.transform.logit_scale,
        softcap=policy.transform.softcap,
        num_prompts=num_prompts,
        old_logprob_T=old_logprob_T,
        clip=None if old_logprob_T is None else objective.clip,
        sampler_logprob_T=None if sampler_cap is None else batch.sampler_logprob_T,
        sampler_cap=sampler_cap,
        ref_logprob_T=ref_logprob_T,
        kl_coef=None if ref_logprob_T is None else objective.kl_coef,
        entropy=True,
        workspace_mib=workspace_mib,
        head_grad_VD=policy.head_grad(),
    )


def token_weights(advantages_NK: Tensor, sequence_T: Tensor, objective: ObjectiveOptions) -> Tensor:
    """(T,) the weight w_s of each token's sequence."""
    weight_NK = sequence_weights(advantages_NK, beta=objective.beta, lam=objective.lam)
    return weight_NK.flatten()[sequence_T]


def clipped_ratios(
    weight_T: Tensor, logprob_T: Tensor, old_T: Tensor, clip: tuple[float, float]
) -> Tensor:
    """(T,) 1 where the ratio is clipped, 0 where not, NaN where there is none."""
    low, high = clip
    weight_T, rho_T = weight_T.to(logprob_T.device), (logprob_T - old_T).exp()
    clipped_T = ((weight_T > 0) & (rho_T > 1 + high)) | ((weight_T < 0) & (rho_T < 1 - low))
    return clipped_T.float().where(~rho_T.isnan(), torch.nan)
