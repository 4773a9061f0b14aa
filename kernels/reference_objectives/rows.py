"""Sequences of a batch of rows, and the surrogate of samples; for the specifications beside it."""

from __future__ import annotations

import torch
from torch import Tensor


def by_sequence(logprob_T: Tensor, sequence_T: Tensor, N: int, K: int) -> list[list[Tensor]]:
    """The log-probs of sequence k of prompt n at [n][k]: rows of n * K + k; none are empty."""
    return [[logprob_T[sequence_T == n * K + k] for k in range(K)] for n in range(N)]


def surrogate(
    logprob: Tensor, advantage: float, old: Tensor | None, clip: tuple[float, float] | None
) -> Tensor:
    """A log pi on policy; with `old`, min(rho A, clip(rho, 1 - low, 1 + high) A) (1707.06347, 7).

    Tokens of one sequence. rho = exp(log pi - old); at rho = 1 both have the same gradient.
    """
    if old is None or clip is None:
        return advantage * logprob
    rho = torch.exp(logprob - old)
    return torch.minimum(rho * advantage, rho.clamp(1 - clip[0], 1 + clip[1]) * advantage)
