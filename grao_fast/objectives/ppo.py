"""PPO's advantages, coefficients and value loss, for a trainer that has a critic.

    delta_t = r_t + gamma V_{t+1} - V_t
    A_t     = delta_t + gamma lam A_{t+1}          generalised advantage estimation
    R_t     = A_t + V_t                            the critic's target
    loss    = -mean_t min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t)
    rho_t   = exp(logp_t - old_t)

V_t is the critic's value before token t is chosen; V and A are 0 after a sequence's last token. The
policy's loss takes one pass of `grao_fast.kernels.linear_policy_loss`:

    advantages = gae(rewards_T, values_T, sequence_T, gamma=1.0, lam=0.95)
    terms_CT = ppo_terms(whitened(advantages.advantages_T, sequence_T), sequence_T)
    off_policy = OffPolicy(old_logprob_T=old_logprob_T, clip=(0.2, 0.2))
    policy = linear_policy_loss(hidden_TD, head_VD, target_T, terms_CT, off_policy=off_policy)

Rows are packed: those of a sequence are in its order, and others may be between them. A row of
sequence -1 does not count, whatever it holds.

Sources: arXiv 1506.02438, Eq. 16 (advantages); arXiv 1707.06347, Eq. 7 (policy) and 9 (values).
Shapes: T rows that predict a token, S sequences, L tokens of the longest one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grao_fast.system.errors import UserError


class Advantages(NamedTuple):
    """Both (T,), in the dtype of the rewards; 0 in rows that do not count."""

    advantages_T: Tensor
    returns_T: Tensor


def gae(
    rewards_T: Tensor,
    values_T: Tensor,
    sequence_T: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Advantages:
    """Generalised advantage estimates, and the returns that the critic is to predict.

    Args:
        rewards_T: (T,) the reward of each token; see `token_rewards`.
        values_T: (T,) the critic's values before each token, constants.
        sequence_T: (T,) int64, the sequence of each row; -1: does not count.
        gamma: discount of a reward by each token in between.
        lam: 0 is the one-step error delta_t, 1 the whole return minus the value.
    """
    live_T = sequence_T >= 0
    sequence_R = sequence_T[live_T]
    rewards_R, values_R = rewards_T[live_T], values_T[live_T].detach().to(rewards_T.dtype)
    place_R = _places(sequence_R)
    L = int(place_R.max()) + 1 if place_R.numel() else 0
    S = int(sequence_R.max()) + 1 if sequence_R.numel() else 0
    # A sequence's end is followed by zeros, which add nothing to its advantages.
    rewards_SL, values_SL = rewards_R.new_zeros(S, L), rewards_R.new_zeros(S, L + 1)
    rewards_SL[sequence_R, place_R] = rewards_R
    values_SL[sequence_R, place_R] = values_R
    delta_SL = rewards_SL + gamma * values_SL[:, 1:] - values_SL[:, :-1]
    advantages_SL = torch.zeros_like(delta_SL)
    following_S = delta_SL.new_zeros(S)
    for t in reversed(range(L)):
        following_S = delta_SL[:, t] + gamma * lam * following_S
        advantages_SL[:, t] = following_S
    advantages_T = torch.zeros_like(rewards_T)
    advantages_T[live_T] = advantages_SL[sequence_R, place_R]
    returns_T = torch.where(live_T, advantages_T + values_T.detach(), 0.0)
    return Advantages(advantages_T, returns_T)


def token_rewards(scores_S: Tensor, sequence_T: Tensor, penalty_T: Tensor | None = None) -> Tensor:
    """(T,) each sequence's score at its last token, minus the penalty of every token.

    penalty_T: usually kl_coef (logp - ref), which keeps the policy near the one that training
        began with; None: no penalty.
    """
    live_T = sequence_T >= 0
    sequence_R = sequence_T[live_T]
    place_R = _places(sequence_R)
    last_S = torch.full_like(scores_S, -1, dtype=torch.int64)
    last_S.scatter_reduce_(0, sequence_R, place_R, "amax")
    rewards_R = torch.where(place_R == last_S[sequence_R], scores_S[sequence_R], 0.0)
    if penalty_T is not None:
        rewards_R = rewards_R - penalty_T[live_T]
    rewards_T = scores_S.new_zeros(sequence_T.shape)
    rewards_T[live_T] = rewards_R
    return rewards_T


def whitened(advantages_T: Tensor, sequence_T: Tensor) -> Tensor:
    """(T,) advantages of mean 0 and variance 1 over the rows that count; 0 in the others.

    All 0 if the advantages are equal. Use it once on all tokens of an update, before the rows are
    split into micro-batches.
    """
    live_T = sequence_T >= 0
    advantages_R = advantages_T[live_T]
    if advantages_R.numel() == 0 or advantages_R.max() == advantages_R.min():
        return torch.zeros_like(advantages_T)
    centred_R = advantages_R - advantages_R.mean()
    whitened_T = torch.zeros_like(advantages_T)
    whitened_T[live_T] = centred_R / centred_R.square().mean().sqrt()
    return whitened_T


def ppo_terms(advantages_T: Tensor, sequence_T: Tensor, *, num_tokens: int | None = None) -> Tensor:
    """(1, T) float32 coefficients of the mean over tokens, for `linear_policy_loss`.

    num_tokens: tokens of the whole update, so that its micro-batches sum to it; None: those of
        these rows.
    """
    live_T = sequence_T >= 0
    count = int(live_T.sum()) if num_tokens is None else num_tokens
    return torch.where(live_T, advantages_T / max(count, 1), 0.0).float()[None]


def value_loss(
    values_T: Tensor,
    returns_T: Tensor,
    sequence_T: Tensor,
    *,
    old_values_T: Tensor | None = None,
    clip: float | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    """The critic's loss, half the mean squared error over tokens, differentiable in values_T.

    With `clip` and `old_values_T`, which go together, the error of a token is the greater one of
    that of V and that of V held within `clip` of its old value, as implementations of PPO have it.

    num_tokens: as in `ppo_terms`.
    """
    if (old_values_T is None) != (clip is None):
        raise UserError("value_loss needs old_values_T and clip together: give both, or neither")
    live_T = sequence_T >= 0
    values_R, returns_R = values_T[live_T], returns_T[live_T]
    error_R = (values_R - returns_R).square()
    if old_values_T is not None and clip is not None:
        old_R = old_values_T[live_T]
        held_R = old_R + (values_R - old_R).clamp(-clip, clip)
        error_R = torch.maximum(error_R, (held_R - returns_R).square())
    count = values_R.numel() if num_tokens is None else num_tokens
    return 0.5 * error_R.sum() / max(count, 1)


def _places(sequence_R: Tensor) -> Tensor:
    """(R,) how many earlier rows each row's sequence has."""
    order_R = sequence_R.argsort(stable=True)
    sorted_R = sequence_R[order_R]
    first_R = torch.searchsorted(sorted_R, sorted_R)
    rank_R = torch.arange(sequence_R.numel(), device=sequence_R.device)
    return torch.empty_like(sequence_R).index_copy_(0, order_R, rank_R - first_R)
