"""SFT, rejection-sampled fine-tuning and advantage-weighted regression.

Shapes: T rows (tokens), N prompts, G samples, K = G + 1 sequences a prompt with the reference last.
`sequence_T` holds n * K + k, or -1 for a row that does not count; a reward of NaN is an absent one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rows import by_sequence


def sft_loss(logprob_T: Tensor, sequence_T: Tensor, rewards_NK: Tensor) -> Tensor:
    """-(1 / sum_n |y_n|) sum_n sum_t log pi(y_nt)."""
    N, K = rewards_NK.shape
    references = [of_group[-1] for of_group in by_sequence(logprob_T, sequence_T, N, K)]
    tokens = sum(reference.numel() for reference in references)
    total = logprob_T[:0].sum()
    for reference in references:
        total = total + reference.sum()
    return -total / max(tokens, 1)


def rft_loss(
    logprob_T: Tensor,
    sequence_T: Tensor,
    rewards_NK: Tensor,
    *,
    best: int | None,
    threshold: float | None,
) -> Tensor:
    """SFT's loss on the samples that are kept (2304.06767, Algorithm 1; 2308.01825).

    Kept of each prompt are the `best` of its samples of at least `threshold`. If m samples tie for
    the last p places, each counts p / m times, in the loss and in the number of tokens.
    """
    N, K = rewards_NK.shape
    total, tokens = logprob_T[:0].sum(), 0.0
    for n, of_group in enumerate(by_sequence(logprob_T, sequence_T, N, K)):
        candidates = [
            (rewards_NK[n, k].item(), of_group[k])
            for k in range(K - 1)
            if of_group[k].numel() > 0 and not rewards_NK[n, k].isnan()
        ]
        candidates = [(r, o) for r, o in candidates if threshold is None or r >= threshold]
        places = len(candidates) if best is None else best
        for reward in sorted({r for r, _ in candidates}, reverse=True):
            tied = [o for r, o in candidates if r == reward]
            share = min(places / len(tied), 1.0)
            for sample in tied:
                total = total + share * sample.sum()
                tokens += share * sample.numel()
            places = max(places - len(tied), 0)
    return -total / max(tokens, 1.0)


def awr_loss(
    logprob_T: Tensor,
    sequence_T: Tensor,
    rewards_NK: Tensor,
    *,
    temperature: float,
    cap: float,
) -> Tensor:
    """-E_{s, a}[min(exp(A / temperature), cap) log pi(a | s)] (1910.00177, Algorithm 1).

    (s, a) are the tokens of all samples that have a reward; A is the reward minus its mean in the
    prompt's samples, in place of a learned value function.
    """
    N, K = rewards_NK.shape
    values: list[Tensor] = []
    for n, of_group in enumerate(by_sequence(logprob_T, sequence_T, N, K)):
        scored = [k for k in range(K - 1) if not rewards_NK[n, k].isnan()]
        rewards = [rewards_NK[n, k].item() for k in scored]
        for k, reward in zip(scored, rewards, strict=True):
            advantage = reward - math.fsum(rewards) / len(rewards)
            values.append(min(math.exp(advantage / temperature), cap) * of_group[k])
    return -torch.cat(values).mean() if values else logprob_T[:0].sum()
