"""CHORD, UFT and HPT.

Shapes and arguments are those of `supervised` and `policy_gradient`. The clipped ratio is of
samples only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .policy_gradient import Clip, dr_grpo_losses, grpo_loss, grpo_token_loss
from .rows import by_sequence
from .supervised import sft_loss


def chord_mu(progress: float, *, start: float, end: float, decay: float, schedule: str) -> float:
    """mu falls from `start` to `end` while progress goes from 0 to `decay`."""
    done = min(progress / decay, 1.0)
    if schedule == "cosine":
        done = 1 - 0.5 * (1 + math.cos(math.pi * done))
    return (1 - done) * start + done * end


def chord_loss(
    logprob_T: Tensor,
    sequence_T: Tensor,
    rewards_NK: Tensor,
    *,
    mu: float,
    phi: bool = False,
    old_logprob_T: Tensor | None = None,
    clip: Clip = None,
) -> Tensor:
    """(1 - mu) L_GRPO + mu L_SFT, both means over all tokens (2508.11408, Eq. 1-3).

    With `phi`, a token's log pi in L_SFT has the constant factor p (1 - p) (Eq. 5 and 6).
    """
    grpo = grpo_token_loss(
        logprob_T, sequence_T, rewards_NK, old_logprob_T=old_logprob_T, clip=clip
    )
    if phi:
        p_T = torch.exp(logprob_T.detach())
        logprob_T = p_T * (1 - p_T) * logprob_T
    return (1 - mu) * grpo + mu * sft_loss(logprob_T, sequence_T, rewards_NK)


def uft_hint_share(progress: float, *, start: float, end: float, decay: float) -> float:
    """p(t) = end + (start - end) (1 + cos(pi t / T)) / 2 before T, then 0 (2505.16984, Eq. B.1)."""
    if progress >= decay:
        return 0.0
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress / decay))


def uft_loss(
    logprob_T: Tensor,
    sequence_T: Tensor,
    rewards_NK: Tensor,
    *,
    hint_coef: float,
    hint_share: float,
    old_logprob_T: Tensor | None = None,
    clip: Clip = None,
) -> Tensor:
    """L_GRPO - hint_coef E[sum over the hint's tokens of log pi(y_t)] (2505.16984, section 3).

    The expectation is over hints of any hint_share |y| of the tokens of y; averaged over prompts.
    """
    N, K = rewards_NK.shape
    loss = grpo_loss(logprob_T, sequence_T, rewards_NK, old_logprob_T=old_logprob_T, clip=clip)
    for of_group in by_sequence(logprob_T, sequence_T, N, K):
        loss = loss - hint_coef * hint_share * of_group[-1].sum() / N
    return loss


def hpt_loss(
    logprob_T: Tensor,
    sequence_T: Tensor,
    rewards_NK: Tensor,
    *,
    gate: float,
    sft_coef: float,
    max_new_tokens: int,
    old_logprob_T: Tensor | None = None,
    clip: Clip = None,
) -> Tensor:
    """The mean over prompts of alpha L_RL + beta L_SFT (2509.04419, Eq. 10-13).

    (alpha, beta) = (1, 0) if the mean reward of the prompt's samples is above the gate, else
    (0, sft_coef). L_RL is Dr. GRPO's loss, L_SFT = -(1/|y|) sum_t log pi(y_t). Without a reward of
    a sample the mean is below any gate.
    """
    N, K = rewards_NK.shape
    reinforced = dr_grpo_losses(
        logprob_T,
        sequence_T,
        rewards_NK,
        max_new_tokens=max_new_tokens,
        old_logprob_T=old_logprob_T,
        clip=clip,
    )
    loss = logprob_T[:0].sum()
    for n, of_group in enumerate(by_sequence(logprob_T, sequence_T, N, K)):
        rewards = [r.item() for r in rewards_NK[n, :-1] if not r.isnan()]
        mean = math.fsum(rewards) / len(rewards) if rewards else -math.inf
        y = of_group[-1]
        imitated = -sft_coef * y.sum() / max(y.numel(), 1)
        loss = loss + (reinforced[n] if mean > gate else imitated)
    return loss / N
