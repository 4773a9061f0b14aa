"""The groups of completions that the dataset stores: none is sampled, and few or none are scored.

Suffixes: N prompts, G samples, K = G + 1 sequences of a prompt, the reference last, F functions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from grao_fast.config import ObjectiveOptions, RewardType
from grao_fast.data.encoding import Encoded
from grao_fast.rewards import GroupScores, Reward
from grao_fast.rewards.functions import ready
from grao_fast.sampling import Completion
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.training.rollout import Rollout, advantages_of, texts_of


def stored_rollout(
    loaded: LoadedPolicy,
    reward: Reward | None,
    prompts: Sequence[Encoded],
    *,
    num_generations: int,
    objective: ObjectiveOptions,
) -> Rollout:
    """The rollout of stored completions; the reward scores those that have no stored reward.

    Each process scores its share of the prompts, and returns the rollout of all.

    num_generations: G. A prompt with fewer completions has no reward at the places of the others.
    """
    world, started = loaded.policy.world, time.perf_counter()
    completions = [completions_of(prompt) for prompt in prompts]

    def score(own: Sequence[int]) -> list[tuple[list[str], Tensor, Tensor]]:
        if not own:  # more processes than prompts
            return []
        texts = [texts_of(loaded, prompts[n], completions[n]) for n in own]
        scores = score_stored(
            reward,
            [prompts[n] for n in own],
            texts,
            num_generations=num_generations,
            reward_type=objective.reward_type,
            places=own,
        )
        return list(zip(texts, scores.rewards_NK, scores.scores_FNG.unbind(1), strict=True))

    with ready(reward):
        scored = world.map(score, range(len(prompts)))
    texts, rewards, scores = (list(column) for column in zip(*scored, strict=True))
    measures = reward is not None and reward.is_measured
    rewards_NK, scores_FNG = torch.stack(rewards), torch.stack(scores, 1)
    names = [] if reward is None else reward.names
    return Rollout(
        prompts=prompts,
        completions=completions,
        texts=texts,
        rewards_NK=rewards_NK,
        advantages_NK=advantages_of(prompts, rewards_NK, objective),
        per_function=GroupScores(rewards_NK, scores_FNG, names).per_function,
        seconds={"reward": time.perf_counter() - started},
        scores_FNG=scores_FNG,
        measured=world.each(reward.take_metrics) if reward is not None and measures else [],
    )


def completions_of(prompt: Encoded) -> list[Completion]:
    """The completions that are stored for a prompt, as a sampler would have returned them."""
    return [Completion(c.token_ids, [*c.logprobs], c.finished) for c in prompt.completions]


def score_stored(
    reward: Reward | None,
    prompts: Sequence[Encoded],
    texts: Sequence[Sequence[str]],
    *,
    num_generations: int,
    reward_type: RewardType,
    places: Sequence[int],
) -> GroupScores:
    """The stored rewards of some prompts' groups; the reward scores what has none.

    texts: of the completions of each prompt.
    places: numbers of the prompts in errors.
    """
    N, G = len(prompts), num_generations
    stored_NK = torch.full((N, G + 1), math.nan, dtype=torch.float64)
    present_NK = torch.zeros(N, G + 1, dtype=torch.bool)
    for n, prompt in enumerate(prompts):
        stored = prompt.example.stored
        assert stored is not None, "examples are read with their completions"
        count = len(stored.rewards)
        stored_NK[n, :count] = torch.tensor(stored.rewards, dtype=torch.float64)
        present_NK[n, :count] = True
        if prompt.reference_ids:
            pairwise = reward_type == "pairwise"  # it is compared with itself
            stored_NK[n, -1] = 0.0 if pairwise else stored.reference_reward
            present_NK[n, -1] = True
    wanted_NK = present_NK & stored_NK.isnan()
    if reward is None or not bool(wanted_NK.any()):
        names = [] if reward is None else reward.names
        scores_FNG = torch.full((len(names), N, G), math.nan, dtype=torch.float64)
        return GroupScores(stored_NK, scores_FNG, names)
    scored = reward.score_groups(
        [prompt.scored for prompt in prompts],
        [[*group, *[""] * (G - len(group))] for group in texts],
        reward_type=reward_type,
        places=places,
        wanted_NK=wanted_NK,
    )
    rewards_NK = torch.where(wanted_NK, scored.rewards_NK, stored_NK)
    return GroupScores(rewards_NK, scored.scores_FNG, scored.names)
