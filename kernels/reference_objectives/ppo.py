"""PPO (arXiv 1707.06347) with generalised advantage estimation (arXiv 1506.02438).

Shapes: T rows (tokens). `sequence_T` holds the sequence of each row, and -1 for a row that does not
count; the rows of a sequence are in its order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards_T: Tensor, values_T: Tensor, sequence_T: Tensor, *, gamma: float, lam: float
) -> Tensor:
    """A_t = sum_l (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t (1506.02438, 16).

    V is 0 after a sequence's last token; A is 0 in rows that do not count.
    """
    advantages_T = torch.zeros_like(rewards_T)
    for s in sequence_T.unique():
        if s < 0:
            continue
        rows = (sequence_T == s).nonzero().squeeze(1).tolist()
        values = [*(values_T[row].item() for row in rows), 0.0]
        rewards = [rewards_T[row].item() for row in rows]
        deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
        for t, row in enumerate(rows):
            advantages_T[row] = sum(
                (gamma * lam) ** ahead * delta for ahead, delta in enumerate(deltas[t:])
            )
    return advantages_T


def ppo_loss(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantages_T: Tensor,
    sequence_T: Tensor,
    *,
    low: float,
    high: float,
) -> Tensor:
    """-mean_t min(rho A, clip(rho, 1 - low, 1 + high) A) of the rows that count (1707.06347, 7)."""
    rows = (sequence_T >= 0).nonzero().squeeze(1)
    rho = torch.exp(logprob_T[rows] - old_logprob_T[rows])
    advantages = advantages_T[rows]
    return -torch.minimum(rho * advantages, rho.clamp(1 - low, 1 + high) * advantages).mean()
