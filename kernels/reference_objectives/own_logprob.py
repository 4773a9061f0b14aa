"""Losses whose tokens are weighed by functions of their own log-probs.

A token's ratio is exp(logp - old). Where `old` is NaN, the token is on policy, and old is its own
log-prob, as a constant.

Shapes: T rows (tokens), N prompts, K sequences of a prompt, the reference last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import clipped, normalised, prompts


def ratios(logprob: Tensor, old_logprob: Tensor) -> Tensor:
    old_logprob = torch.where(old_logprob.isnan(), logprob.detach(), old_logprob)
    return torch.exp(logprob - old_logprob)


def dapo(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    sequence_T: Tensor,
    rewards_NK: Tensor,
    *,
    low: float,
    high: float,
) -> Tensor:
    """arXiv 2503.14476, Eq. 8 and 9, with the mean over the tokens of all prompts' samples."""
    total, tokens = logprob_T.new_zeros(()), 0
    for n, sequences in enumerate(prompts(rewards_NK, sequence_T)):
        for each in sequences:
            if each.is_reference:
                continue
            advantage = normalised(each.reward, rewards_NK[n, :-1])
            ratio = ratios(logprob_T[each.rows], old_logprob_T[each.rows])
            total = total + clipped(ratio, advantage, low, high).sum()
            tokens += each.rows.numel()
    return -total / max(tokens, 1)


def cispo(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    sequence_T: Tensor,
    rewards_NK: Tensor,
    *,
    low: float,
    high: float,
) -> Tensor:
    """arXiv 2506.13585, Eq. 4 and 5, with the mean over the tokens of all prompts' samples."""
    total, tokens = logprob_T.new_zeros(()), 0
    for n, sequences in enumerate(prompts(rewards_NK, sequence_T)):
        for each in sequences:
            if each.is_reference:
                continue
            advantage = normalised(each.reward, rewards_NK[n, :-1])
            ratio = ratios(logprob_T[each.rows], old_logprob_T[each.rows])
            weight = ratio.clamp(1 - low, 1 + high).detach()
            total = total + (weight * advantage * logprob_T[each.rows]).sum()
            tokens += each.rows.numel()
    return -total / max(tokens, 1)


def luffy(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    sequence_T: Tensor,
    rewards_NK: Tensor,
    *,
    low: float,
    high: float,
    gamma: float = 0.1,
) -> Tensor:
    """arXiv 2504.14945, section 3, mixed-policy GRPO with policy shaping.

    The reference is a member of the group, with pi_phi = 1: its ratio is p, shaped by
    f(p) = p / (p + gamma) and not clipped. 1/Z is that of all tokens of the prompt's group.
    """
    total = logprob_T.new_zeros(())
    for n, sequences in enumerate(prompts(rewards_NK, sequence_T)):
        Z = sum(each.rows.numel() for each in sequences)
        for each in sequences:
            advantage = normalised(each.reward, rewards_NK[n])
            if each.is_reference:
                p = torch.exp(logprob_T[each.rows])
                total = total + (p / (p + gamma) * advantage).sum() / Z
            else:
                ratio = ratios(logprob_T[each.rows], old_logprob_T[each.rows])
                total = total + clipped(ratio, advantage, low, high).sum() / Z
    return -total / len(rewards_NK)


def dft(logprob_T: Tensor, sequence_T: Tensor, rewards_NK: Tensor) -> Tensor:
    """arXiv 2508.05629, section 3, the loss of tokens: the mean of -sg(p) logp.

    The mean is over the tokens of all references, whether they have a reward or not.
    """
    K = rewards_NK.shape[1]
    total, tokens = logprob_T.new_zeros(()), 0
    for n in range(len(rewards_NK)):
        logprob = logprob_T[sequence_T == n * K + K - 1]
        total = total + (logprob.exp().detach() * logprob).sum()
        tokens += logprob.numel()
    return -total / max(tokens, 1)
