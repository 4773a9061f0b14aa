"""A rollout: prompts, the completions sampled for them, and their rewards.

Suffixes: N prompts, G samples, K = G + 1 sequences of a prompt, the reference last.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grao_fast.config import ObjectiveOptions, SamplingOptions
from grao_fast.data.encoding import Encoded
from grao_fast.data.packing import Group
from grao_fast.objectives import grao
from grao_fast.rewards import Reward
from grao_fast.rewards.functions import GroupScores
from grao_fast.sampling import Completion
from grao_fast.sampling.loading import LoadedPolicy
from grao_fast.sampling.seeds import prompt_seeds
from grao_fast.training.ahead import Sampled


@dataclass(frozen=True)
class Rollout:
    """The samples of one step and their rewards.

    prompts: N encoded examples.
    completions, texts: N lists of G.
    rewards_NK, advantages_NK: float64 on the CPU, NaN where absent.
    per_function: mean reward over the samples of each reward function.
    seconds: by phase: "sample", "reward", and "wait" where the samples were sampled ahead.
    staleness: steps of the policy since the sampling began; None: sampled when they were needed.
    """

    prompts: Sequence[Encoded]
    completions: list[list[Completion]]
    texts: list[list[str]]
    rewards_NK: Tensor
    advantages_NK: Tensor
    per_function: dict[str, float]
    seconds: dict[str, float]
    staleness: int | None = None


def sample(
    loaded: LoadedPolicy,
    prompts: Sequence[Encoded],
    places: Sequence[int],
    *,
    sampling: SamplingOptions,
    seed: int,
) -> list[list[Completion]]:
    """G completions of each of a step's prompts that has one of these places."""
    seeds = prompt_seeds(seed, len(prompts))
    return loaded.sampler.sample(
        [prompts[n].prompt_ids for n in places],
        num_generations=sampling.num_generations,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seeds=[seeds[n] for n in places],
    )


def sample_and_score(
    loaded: LoadedPolicy,
    reward: Reward,
    prompts: Sequence[Encoded],
    *,
    sampling: SamplingOptions,
    objective: ObjectiveOptions,
    seed: int,
    ahead: Sampled | None = None,
) -> Rollout:
    """Sample G completions of every prompt and score them beside the references.

    Each process does its share of the prompts, and returns the rollout of all. What is sampled for
    a prompt does not depend on the number of processes.

    ahead: this process's share, if it was sampled ahead; None: it is sampled now.
    """
    world = loaded.policy.world
    places = list(range(len(prompts)))

    def completions_of(own: Sequence[int]) -> list[list[Completion]]:
        if ahead is not None:
            return ahead.completions
        return sample(loaded, prompts, own, sampling=sampling, seed=seed)

    started = time.perf_counter()
    with loaded.ready_to_sample():
        completions = world.map(completions_of, places)
    sampled = time.perf_counter()

    def score(own: Sequence[int]) -> list[tuple[list[str], Tensor, Tensor]]:
        if not own:  # more processes than prompts
            return []
        texts = [
            loaded.decode([prompts[n].prompt_ids] * len(completions[n]), completions[n])
            for n in own
        ]
        scores = reward.score_groups(
            [prompts[n].scored for n in own],
            texts,
            reward_type=objective.reward_type,
            places=own,
        )
        return list(zip(texts, scores.rewards_NK, scores.scores_FNG.unbind(1), strict=True))

    texts, rewards, scores = (
        list(column) for column in zip(*world.map(score, places), strict=True)
    )
    scored = GroupScores(torch.stack(rewards), torch.stack(scores, 1), reward.names)
    seconds = {"sample": sampled - started, "reward": time.perf_counter() - sampled}
    if ahead is not None:
        seconds |= {"sample": ahead.seconds, "wait": ahead.waited}
    return Rollout(
        prompts=prompts,
        completions=completions,
        texts=texts,
        rewards_NK=scored.rewards_NK,
        advantages_NK=grao.advantages(scored.rewards_NK, objective),
        per_function=scored.per_function,
        seconds=seconds,
        staleness=None if ahead is None else ahead.staleness,
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
