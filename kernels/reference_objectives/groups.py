"""What the specifications share: the sequences of a prompt, their rows and normalised rewards.

`sequence_T` holds n * K + k for a row of sequence k of prompt n, and -1 for a row that does not
count. The reference is the last of a prompt's K sequences. A reward of NaN is an absent sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Sequence(NamedTuple):
    """A sequence that is present and has rows."""

    k: int
    reward: Tensor
    rows: Tensor  # indices into T
    is_reference: bool


def prompts(rewards_NK: Tensor, sequence_T: Tensor) -> Iterator[list[Sequence]]:
    """The sequences of each prompt that have a reward and a row."""
    K = rewards_NK.shape[1]
    for n, rewards_K in enumerate(rewards_NK):
        sequences = [
            Sequence(k, reward, (sequence_T == n * K + k).nonzero().squeeze(1), k == K - 1)
            for k, reward in enumerate(rewards_K)
        ]
        yield [each for each in sequences if not each.reward.isnan() and each.rows.numel()]


def normalised(reward: Tensor, rewards: Tensor) -> Tensor:
    """(reward - mean) / standard deviation of the rewards that are present; 0 if all are equal."""
    rewards = rewards[~rewards.isnan()]
    if rewards.numel() == 0 or rewards.max() == rewards.min():
        return torch.zeros_like(reward)
    mean = rewards.mean()
    return (reward - mean) / ((rewards - mean) ** 2).mean().sqrt()


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """min(ratio A, clip(ratio, 1 - low, 1 + high) A), as in PPO (arXiv 1707.06347, Eq. 7)."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
