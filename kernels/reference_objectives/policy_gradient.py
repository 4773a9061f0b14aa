"""REINFORCE, RLOO, GRPO and Dr. GRPO.

Shapes: T rows (tokens), N prompts, G samples, K = G + 1 sequences a prompt with the reference last.
`sequence_T` holds n * K + k, or -1 for a row that does not count; a reward of NaN is an absent one.
G is the number of samples that have a reward.

`old_logprob_T` and `clip` are of the clipped ratio, see `rows.surrogate`; without them the samples
are the policy's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from .rows import by_sequence, surrogate

Clip = tuple[float, float] | None


def _of_samples(
    logprob_T: Tensor,
    sequence_T: Tensor,
    rewards_NK: Tensor,
    old_logprob_T: Tensor | None,
    clip: Clip,
    advantages: Callable[[list[float]], list[float]],
    length: Callable[[int], float],
) -> list[list[Tensor]]:
    """For each prompt, and each of its samples with a reward, sum_t surrogate_t / length."""
    N, K = rewards_NK.shape
    logprobs = by_sequence(logprob_T, sequence_T, N, K)
    olds = None if old_logprob_T is None else by_sequence(old_logprob_T, sequence_T, N, K)
    outputs = []
    for n in range(N):
        scored = [k for k in range(K - 1) if not rewards_NK[n, k].isnan()]
        of_scored = advantages([rewards_NK[n, k].item() for k in scored])
        outputs.append(
            [
                surrogate(logprobs[n][k], A, None if olds is None else olds[n][k], clip).sum()
                / length(max(logprobs[n][k].numel(), 1))
                for k, A in zip(scored, of_scored, strict=True)
            ]
        )
    return outputs


def reinforce_loss(
    logprob_T: Tensor,
    sequence_T: Tensor,
    rewards_NK: Tensor,
    *,
    old_logprob_T: Tensor | None = None,
    clip: Clip = None,
) -> Tensor:
    """-(1/n) sum_i (r_i - b) log pi(o_i) over the n samples of the step (2402.14740, Eq. 7).

    b is the mean of their rewards.
    """
    rewards = [r.item() for r in rewards_NK[:, :-1].flatten() if not r.isnan()]
    mean = math.fsum(rewards) / max(len(rewards), 1)
    if len(set(rewards)) == 1:
        mean = rewards[0]
    values = _of_samples(
        logprob_T,
        sequence_T,
        rewards_NK,
        old_logprob_T,
        clip,
        advantages=lambda of_group: [r - mean for r in of_group],
        length=lambda tokens: 1.0,
    )
    total = logprob_T[:0].sum()
    for of_prompt in values:
        for value in of_prompt:
            total = total + value
    return -total / max(len(rewards), 1)


def rloo_loss(
    logprob_T: Tensor,
    sequence_T: Tensor,
    rewards_NK: Tensor,
    *,
    old_logprob_T: Tensor | None = None,
    clip: Clip = None,
) -> Tensor:
    """-(1/G) sum_i (r_i - mean of the others' r_j) log pi(o_i), averaged over prompts (2402.14740).

    A sample that is alone has no baseline, and is left out.
    """

    def advantages(rewards: list[float]) -> list[float]:
        if len(set(rewards)) <= 1:
            return [0.0] * len(rewards)
        others = [rewards[:i] + rewards[i + 1 :] for i in range(len(rewards))]
        return [r - math.fsum(o) / len(o) for r, o in zip(rewards, others, strict=True)]

    values = _of_samples(
        logprob_T, sequence_T, rewards_NK, old_logprob_T, clip, advantages, lambda tokens: 1.0
    )
    return _mean_of_prompts(logprob_T, values)


def grpo_loss(
    logprob_T: Tensor,
    sequence_T: Tensor,
    rewards_NK: Tensor,
    *,
    sigma: str = "population",
    old_logprob_T: Tensor | None = None,
    clip: Clip = None,
) -> Tensor:
    """-(1/G) sum_i (1/|o_i|) sum_t of the surrogate, averaged over prompts (2402.03300, Eq. 3).

    A_i = (r_i - mean) / std (section 4.1.2); 0 if all rewards are equal. `sigma` says whether the
    variance divides by G ("population") or by G - 1 ("sample").
    """
    values = _of_samples(
        logprob_T,
        sequence_T,
        rewards_NK,
        old_logprob_T,
        clip,
        advantages=lambda rewards: _standardised(rewards, sigma),
        length=lambda tokens: tokens,
    )
    return _mean_of_prompts(logprob_T, values)


def grpo_token_loss(
    logprob_T: Tensor,
    sequence_T: Tensor,
    rewards_NK: Tensor,
    *,
    old_logprob_T: Tensor | None = None,
    clip: Clip = None,
) -> Tensor:
    """-(1 / sum_i |o_i|) sum_i sum_t of the surrogate, i over all samples (2508.11408, Eq. 2)."""
    N, K = rewards_NK.shape
    values = _of_samples(
        logprob_T,
        sequence_T,
        rewards_NK,
        old_logprob_T,
        clip,
        advantages=lambda rewards: _standardised(rewards, "population"),
        length=lambda tokens: 1.0,
    )
    total, tokens = logprob_T[:0].sum(), 0
    for n, of_group in enumerate(by_sequence(logprob_T, sequence_T, N, K)):
        total = sum(values[n], start=total)
        tokens += sum(of_group[k].numel() for k in range(K - 1) if not rewards_NK[n, k].isnan())
    return -total / max(tokens, 1)


def _standardised(rewards: list[float], sigma: str) -> list[float]:
    if len(set(rewards)) <= 1:
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    squares = math.fsum((r - mean) ** 2 for r in rewards)
    std = math.sqrt(squares / (len(rewards) - (sigma == "sample")))
    return [(r - mean) / std for r in rewards]


def dr_grpo_losses(
    logprob_T: Tensor,
    sequence_T: Tensor,
    rewards_NK: Tensor,
    *,
    max_new_tokens: int,
    old_logprob_T: Tensor | None = None,
    clip: Clip = None,
) -> list[Tensor]:
    """For each prompt, -(1/G) sum_i (1/M) sum_t of the surrogate, A_i = r_i - mean (2503.20783).

    M is a constant, the most tokens that a sample may have (Listing 1). The loss is their mean.
    """

    def advantages(rewards: list[float]) -> list[float]:
        if len(set(rewards)) <= 1:
            return [0.0] * len(rewards)
        return [r - math.fsum(rewards) / len(rewards) for r in rewards]

    values = _of_samples(
        logprob_T,
        sequence_T,
        rewards_NK,
        old_logprob_T,
        clip,
        advantages,
        lambda tokens: max_new_tokens,
    )
    zero = logprob_T[:0].sum()
    return [-sum(each, start=zero) / max(len(each), 1) for each in values]


def dr_grpo_loss(
    logprob_T: Tensor,
    sequence_T: Tensor,
    rewards_NK: Tensor,
    *,
    max_new_tokens: int,
    old_logprob_T: Tensor | None = None,
    clip: Clip = None,
) -> Tensor:
    """The mean over prompts of `dr_grpo_losses`."""
    losses = dr_grpo_losses(
        logprob_T,
        sequence_T,
        rewards_NK,
        max_new_tokens=max_new_tokens,
        old_logprob_T=old_logprob_T,
        clip=clip,
    )
    return sum(losses, start=logprob_T[:0].sum()) / len(losses)


def _mean_of_prompts(logprob_T: Tensor, values: list[list[Tensor]]) -> Tensor:
    zero = logprob_T[:0].sum()
    means = [sum(each, start=zero) / max(len(each), 1) for each in values]
    return -sum(means, start=zero) / len(means)
