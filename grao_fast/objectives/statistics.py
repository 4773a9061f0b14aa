"""What objectives have in common: baselines of samples' rewards, means of references, schedules.

A sample counts in a baseline, and in the number of samples that a mean is over, if it has a reward.
A reference needs no reward to be imitated, only tokens.

Suffixes: N prompts, G samples, K = G + 1 sequences of a prompt, the reference last.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from grao_fast.objectives.base import Groups

Schedule = Literal["linear", "cosine"]


def sample_rewards(rewards_NK: Tensor) -> Tensor:
    """(N, G) float64, the samples' rewards; NaN where a sample has none."""
    return rewards_NK[:, :-1].double()


def sample_counts(rewards_NK: Tensor) -> Tensor:
    """(N, 1) float64, the samples of each prompt that have a reward; at least 1."""
    return (~rewards_NK[:, :-1].isnan()).sum(1, keepdim=True).clamp(min=1).double()


def centred(rewards_NG: Tensor, *, of_step: bool = False) -> Tensor:
    """Rewards minus their mean in each group, or in the whole step; NaN where there is none.

    Exactly 0 where all rewards of the mean are equal, which rounding would not give.
    """
    shape = (-1,) if of_step else rewards_NG.shape
    values = rewards_NG.reshape(shape)
    high = values.nan_to_num(-torch.inf).amax(-1, keepdim=True)
    low = values.nan_to_num(torch.inf).amin(-1, keepdim=True)
    differences = values - values.nanmean(-1, keepdim=True)
    differences = torch.where(high > low, differences, 0.0).where(~values.isnan(), torch.nan)
    return differences.reshape(rewards_NG.shape)


def of_samples(advantages_NG: Tensor, rewards_NK: Tensor) -> Tensor:
    """(N, K) the samples' advantages, and 0 for references; NaN where a reward is."""
    advantages_NK = torch.cat([advantages_NG, torch.zeros_like(rewards_NK[:, -1:])], 1).double()
    return advantages_NK.where(~rewards_NK.isnan(), torch.nan)


def with_imitation(advantages_NK: Tensor, weight_N: Tensor | float = 1.0) -> Tensor:
    """(N, K) these advantages of samples, and the weight of references, whatever their reward."""
    advantages_NK = advantages_NK.clone()
    advantages_NK[:, -1] = weight_N
    return advantages_NK


def reference_lengths(groups: Groups) -> Tensor:
    """(N, K) float64, the tokens of each reference; 0 for samples."""
    lengths_NK = torch.zeros_like(groups.length_NK, dtype=torch.float64)
    lengths_NK[:, -1] = groups.length_NK[:, -1]
    return lengths_NK


def mean_over_all_tokens(weights_NK: Tensor, counted_NK: Tensor, groups: Groups) -> Tensor:
    """(N, K) weights over the number of tokens of the step's sequences that count.

    counted_NK: how often a sequence counts in that number: 1, 0, or a share.
    """
    tokens = (counted_NK * groups.length_NK).sum()
    has_tokens_NK = groups.length_NK > 0
    return torch.where(has_tokens_NK, weights_NK.double() / tokens.clamp(min=1), 0.0)


def mean_over_sample_tokens(weights_NK: Tensor, groups: Groups) -> Tensor:
    """(N, K) weights over the number of tokens of the step's scored samples; 0 for references."""
    counted_NK = groups.present_NK.clone()
    counted_NK[:, -1] = False
    return mean_over_all_tokens(weights_NK.where(counted_NK, 0.0), counted_NK, groups)


def imitation_coefficients(groups: Groups) -> Tensor:
    """(N, K) coefficients of the mean log-prob of the tokens of all references of the step."""
    is_reference_NK = (reference_lengths(groups) > 0).double()
    return mean_over_all_tokens(is_reference_NK, is_reference_NK, groups)


def annealed(progress: float, start: float, end: float, share: float, schedule: Schedule) -> float:
    """The value at some progress: from `start` to `end` over a share of the run, then `end`.

    schedule: "linear", or "cosine" for half a period.
    """
    if progress >= share:
        return end
    done = progress / share
    left = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return end + (start - end) * left
