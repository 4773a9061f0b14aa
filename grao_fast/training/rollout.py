"""A rollout: prompts, the completions sampled for them, and their rewards.

Suffixes: N prompts, G samples, K = G + 1 sequences of a prompt, the reference last.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from grao_fast.config import ObjectiveOptions, SamplingOptions
from grao_fast.data.encoding import Encoded
from grao_fast.data.packing import Group
from grao_fast.objectives import grao
from grao_fast.rewards import Reward
from grao_fast.sampling import Completion
from grao_fast.sampling.loading import LoadedPolicy
from grao_fast.sampling.seeds import prompt_seeds


@dataclass(frozen=True)
class Rollout:
    """The samples of one step and their rewards.

    prompts: N encoded examples.
    completions, texts: N lists of G.
    rewards_NK, advantages_NK: float64 on the CPU, NaN where absent.
    per_function: mean reward over the samples of each reward function.
    """

    prompts: Sequence[Encoded]
    completions: list[list[Completion]]
    texts: list[list[str]]
    rewards_NK: Tensor
    advantages_NK: Tensor
    per_function: dict[str, float]
    seconds: dict[str, float]


def sample_and_score(
    loaded: LoadedPolicy,
    reward: Reward,
    prompts: Sequence[Encoded],
    *,
    sampling: SamplingOptions,
    objective: ObjectiveOptions,
    seed: int,
) -> Rollout:
    """Sample G completions of every prompt and score them beside the references."""
    started = time.perf_counter()
    completions = loaded.sampler.sample(
        [prompt.prompt_ids for prompt in prompts],
        num_generations=sampling.num_generations,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seeds=prompt_seeds(seed, len(prompts)),
    )
    texts = [
        loaded.decode([prompt.prompt_ids] * len(group), group)
        for prompt, group in zip(prompts, completions, strict=True)
    ]
    sampled = time.perf_counter()
    scores = reward.score_groups(
        [prompt.scored for prompt in prompts], texts, reward_type=objective.reward_type
    )
    return Rollout(
        prompts=prompts,
        completions=completions,
        texts=texts,
        rewards_NK=scores.rewards_NK,
        advantages_NK=grao.advantages(scores.rewards_NK, objective),
        per_function=scores.per_function,
        seconds={"sample": sampled - started, "reward": time.perf_counter() - sampled},
    )


def to_groups(rollout: Rollout, objective: ObjectiveOptions) -> list[Group]:
    """The groups of a rollout; sequences that neither objective nor KL term needs are not live."""
    live_NK = grao.live_sequences(rollout.rewards_NK, rollout.advantages_NK, objective)
    return [
        Group(
            prompt_ids=prompt.prompt_ids,
            sequence_ids=[*(c.token_ids for c in completions), prompt.reference_ids],
            rewards_K=rollout.rewards_NK[n],
            live_K=live_NK[n],
            sampler_logprobs=[c.logprobs for c in completions],
        )
        for n, (prompt, completions) in enumerate(
            zip(rollout.prompts, rollout.completions, strict=True)
        )
    ]
