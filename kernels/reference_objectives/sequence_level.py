"""Losses that depend on sums of log-probs, or on means of entropies, over whole sequences.

Shapes: T rows (tokens), N prompts, K sequences of a prompt, the reference last.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .groups import clipped, normalised, prompts
from .own_logprob import ratios


def gspo(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    sequence_T: Tensor,
    rewards_NK: Tensor,
    *,
    low: float,
    high: float,
) -> Tensor:
    """arXiv 2507.18071, Eq. 5 to 7: the clipped ratio of sequences, mean over samples."""
    total = logprob_T.new_zeros(())
    for n, sequences in enumerate(prompts(rewards_NK, sequence_T)):
        G = int((~rewards_NK[n, :-1].isnan()).sum())
        for each in sequences:
            if each.is_reference:
                continue
            advantage = normalised(each.reward, rewards_NK[n, :-1])
            ratio = ratios(logprob_T[each.rows], old_logprob_T[each.rows]).log().mean().exp()
            total = total + clipped(ratio, advantage, low, high) / G
    return -total / len(rewards_NK)


def dpo(
    logprob_T: Tensor,
    ref_logprob_T: Tensor,
    sequence_T: Tensor,
    rewards_NK: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """arXiv 2305.18290, Eq. 7, of the best and the worst sequence of each group.

    With label smoothing, a pair is the other way round with that probability. Of equal rewards the
    first counts; a group whose rewards are all equal has no pair.
    """
    total = logprob_T.new_zeros(())
    for sequences in prompts(rewards_NK, sequence_T):
        if not sequences:
            continue
        best = max(sequences, key=lambda each: each.reward)
        worst = min(sequences, key=lambda each: each.reward)
        if best.reward == worst.reward:
            continue
        gain = logprob_T[best.rows].sum() - ref_logprob_T[best.rows].sum()
        loss = logprob_T[worst.rows].sum() - ref_logprob_T[worst.rows].sum()
        margin = beta * gain - beta * loss
        total = total + (1 - label_smoothing) * logsigmoid(margin)
        total = total + label_smoothing * logsigmoid(-margin)
    return -total / len(rewards_NK)


def srft(
    logprob_T: Tensor,
    entropy_T: Tensor,
    sequence_T: Tensor,
    rewards_NK: Tensor,
    *,
    threshold: float = 0.0,
) -> Tensor:
    """arXiv 2506.19767, section 4, the sum of three losses:

        SFT of demonstrations   w_SFT E[-log pi(y)],        w_SFT = 0.5 sg(exp(-H))
        RL of demonstrations    -E[r A], r = pi(y_t)        behaviour policy 1, no clip
        RL of rollouts          w_RL E[-log pi(y+)] + E[log pi(y-)],    w_RL = 0.1 sg(exp(H))

    Means are over a sequence's tokens, a prompt's samples and prompts; H is the mean entropy of a
    sequence's tokens. Samples with a reward above the threshold are y+, the others y-. A
    demonstration needs no reward for the first loss.
    """
    K = rewards_NK.shape[1]
    total = logprob_T.new_zeros(())
    for n, sequences in enumerate(prompts(rewards_NK, sequence_T)):
        G = int((~rewards_NK[n, :-1].isnan()).sum())
        demonstration = sequence_T == n * K + K - 1
        if demonstration.any():
            H = entropy_T[demonstration].mean().detach()
            total = total - 0.5 * torch.exp(-H) * logprob_T[demonstration].mean()
        for each in sequences:
            logprob = logprob_T[each.rows]
            H = entropy_T[each.rows].mean().detach()
            if each.is_reference:
                advantage = normalised(each.reward, rewards_NK[n])
                total = total - (torch.exp(logprob) * advantage).mean()
            elif each.reward > threshold:
                total = total - 0.1 * torch.exp(H) * logprob.mean() / G
            else:
                total = total + logprob.mean() / G
    return total / len(rewards_NK)
