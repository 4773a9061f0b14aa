"""The policy loss for verl: clipped ratios for samples, log-probs for references."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.utils.torch_functional import masked_mean

from grao_fast.integrations.verl.advantages import NAME, is_reference

_AGGREGATION = "seq-mean-token-mean"  # what GRAO's advantages are made for


@register_policy_loss(NAME)
def grao_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = _AGGREGATION,
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """loss = -(1 / (N K)) sum_s mean_t a value, of the whole mini-batch's N K sequences.

    value = log pi for a token of a reference. For a sample's, it is the ratio exp(logp - old),
    clipped as in PPO by verl's clip_ratio_low and clip_ratio_high, times its importance weight.

    Args:
        old_log_prob, log_prob, advantages, response_mask, rollout_is_weights: (B, L).
        loss_agg_mode: "seq-mean-token-mean".
        config: verl's ActorConfig.

    Returns:
        The loss, and metrics of the samples' ratios under verl's names.

    Raises:
        ValueError: another loss_agg_mode.
    """
    if loss_agg_mode != _AGGREGATION:
        raise ValueError(
            f"loss_mode={NAME} is a mean over tokens, then over sequences: set "
            f"actor_rollout_ref.actor.loss_agg_mode={_AGGREGATION}, not {loss_agg_mode}"
        )
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    counts_BL = response_mask.bool()
    sample_BL = counts_BL & ~is_reference(response_mask)[:, None]
    gap_BL = (log_prob - old_log_prob).where(sample_BL, 0)
    ratio_BL = gap_BL.exp()
    clipped_BL = torch.where(
        advantages > 0, ratio_BL.clamp(max=1 + high), ratio_BL.clamp(min=1 - low)
    )
    value_BL = clipped_BL if rollout_is_weights is None else clipped_BL * rollout_is_weights
    # agg_loss multiplies by the mask, which would not remove what is not finite
    value_BL = torch.where(sample_BL, value_BL, log_prob.where(counts_BL, 0))
    loss = agg_loss(
        loss_mat=-advantages * value_BL,
        loss_mask=response_mask,
        loss_agg_mode=loss_agg_mode,
        **config.global_batch_info,
    )
    metrics = {
        "actor/pg_clipfrac": masked_mean((clipped_BL != ratio_BL).float(), sample_BL).item(),
        "actor/ppo_kl": masked_mean(-gap_BL, sample_BL).item(),
    }
    return loss, metrics
