"""A rollout: prompts, the completions sampled for them, and their rewards.

Suffixes: N prompts, G samples, K = G + 1 sequences of a prompt, the reference last.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from grao_fast.config import ObjectiveOptions, RewardType, SamplingOptions
from grao_fast.data.encoding import Encoded
from grao_fast.rewards import Reward
from grao_fast.rewards.functions import GroupScores
from grao_fast.rewards.measured import Metrics
from grao_fast.sampling import Completion
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.sampling.seeds import prompt_seeds
from grao_fast.training.ahead import Sampled, Share

T = TypeVar("T")


@dataclass(frozen=True)
class Rollout:
    """The samples of one step and their rewards.

    prompts: N encoded examples.
    completions, texts: N lists of G; of fewer, where fewer are stored.
    rewards_NK, advantages_NK: float64 on the CPU, NaN where absent.
    per_function: mean reward over the samples of each reward function.
    scores_FNG: the samples' score by each reward function, as in `GroupScores`; None: unknown.
    counts: metrics of how the prompts were drawn.
    seconds: by phase: "sample", "reward" after it, "reward_overlapped" before that where rewards
        are called for each group, and "wait" where the samples were sampled ahead.
    measured: the reward functions' own metrics, of each process.
    staleness: steps of the policy since the sampling began; None: sampled when they were needed.
    progress: the share of the run's steps that are done, in [0, 1).
    """

    prompts: Sequence[Encoded]
    completions: list[list[Completion]]
    texts: list[list[str]]
    rewards_NK: Tensor
    advantages_NK: Tensor
    per_function: dict[str, float]
    seconds: dict[str, float]
    staleness: int | None = None
    scores_FNG: Tensor | None = None
    counts: Mapping[str, float] = field(default_factory=dict)
    measured: Sequence[Metrics] = ()
    progress: float = 0.0

    @property
    def dead_N(self) -> Tensor:
        """Whether a group has no weight, as where all its rewards are equal or absent."""
        return (self.advantages_NK.nan_to_num(0.0) == 0).all(1)

    @property
    def sampled_tokens(self) -> int:
        """Tokens of all completions."""
        return sum(len(c.token_ids) for group in self.completions for c in group)

    def replaced(self, places: Sequence[int], other: Rollout, by: Sequence[int]) -> Rollout:
        """This rollout with the groups at some places replaced by those of another.

        Seconds are those of both.
        """
        assert self.scores_FNG is not None and other.scores_FNG is not None, "of scored rollouts"
        fresh = dict(zip(places, by, strict=True))
        N = len(self.prompts)
        order = [N + fresh[n] if n in fresh else n for n in range(N)]

        def joined(one: Sequence[T], two: Sequence[T]) -> list[T]:
            both = [*one, *two]
            return [both[n] for n in order]

        scores_FNG = torch.cat([self.scores_FNG, other.scores_FNG], 1)[:, order]
        rewards_NK = torch.cat([self.rewards_NK, other.rewards_NK])[order]
        return replace(
            self,
            prompts=joined(self.prompts, other.prompts),
            completions=joined(self.completions, other.completions),
            texts=joined(self.texts, other.texts),
            rewards_NK=rewards_NK,
            advantages_NK=torch.cat([self.advantages_NK, other.advantages_NK])[order],
            per_function=GroupScores(rewards_NK, scores_FNG, [*self.per_function]).per_function,
            seconds={
                phase: self.seconds.get(phase, 0.0) + other.seconds.get(phase, 0.0)
                for phase in self.seconds | other.seconds
            },
            scores_FNG=scores_FNG,
            measured=[*self.measured, *other.measured],
        )


def sample(
    loaded: LoadedPolicy,
    reward: Reward,
    prompts: Sequence[Encoded],
    places: Sequence[int],
    *,
    sampling: SamplingOptions,
    reward_type: RewardType,
    seeds: Sequence[int],
    alone: bool = True,
) -> Share:
    """G completions of each of a step's prompts that has one of these places.

    Groups that are whole are scored meanwhile, by the functions that are marked for it.

    seeds: of all prompts.
    alone: see `EarlyCalls`.
    """
    early = reward.begin([p.scored for p in prompts], reward_type=reward_type, alone=alone)

    def on_group(i: int, group: list[Completion]) -> None:
        assert early is not None
        early.begin(places[i], texts_of(loaded, prompts[places[i]], group))

    try:
        completions = loaded.sampler.sample(
            [prompts[n].prompt_ids for n in places],
            num_generations=sampling.num_generations,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seeds=[seeds[n] for n in places],
            on_group=None if early is None else on_group,
        )
        for i, group in enumerate(completions):
            if early is not None and places[i] not in early.begun:
                on_group(i, group)
    except BaseException:
        if early is not None:
            early.abandon()
        raise
    return Share(completions, early)


def references_only(prompts: Sequence[Encoded], objective: ObjectiveOptions) -> Rollout:
    """The rollout of an objective that needs no samples: K is 1, and nothing is scored.

    A reference has the reward 0, so that it counts as present.
    """
    rewards_N1 = torch.tensor(
        [[0.0 if prompt.reference_ids else torch.nan] for prompt in prompts], dtype=torch.float64
    )
    return Rollout(
        prompts=prompts,
        completions=[[] for _ in prompts],
        texts=[[] for _ in prompts],
        rewards_NK=rewards_N1,
        advantages_NK=advantages_of(prompts, rewards_N1, objective),
        per_function={},
        seconds={},
    )


def advantages_of(
    prompts: Sequence[Encoded], rewards_NK: Tensor, objective: ObjectiveOptions
) -> Tensor:
    """(N, K) the advantages that an objective gives; NaN where a sequence is absent.

    An objective that imitates references whatever their reward cannot tell which are absent.
    """
    absent_NK = rewards_NK.new_zeros(rewards_NK.shape, dtype=torch.bool)
    absent_NK[:, -1] = torch.tensor([not prompt.reference_ids for prompt in prompts])
    return objective.formula.advantages(rewards_NK).masked_fill(absent_NK, torch.nan)


def texts_of(loaded: LoadedPolicy, prompt: Encoded, group: Sequence[Completion]) -> list[str]:
    """The texts of a prompt's completions."""
    return loaded.decode([prompt.prompt_ids] * len(group), group) if group else []


def sample_and_score(
    loaded: LoadedPolicy,
    reward: Reward,
    prompts: Sequence[Encoded],
    *,
    sampling: SamplingOptions,
    objective: ObjectiveOptions,
    seed: int,
    first: int = 0,
    ahead: Sampled | None = None,
) -> Rollout:
    """Sample G completions of every prompt and score them beside the references.

    Each process does its share of the prompts, and returns the rollout of all. What is sampled for
    a prompt does not depend on the number of processes.

    seed: of the step.
    first: prompts that the step has sampled already.
    ahead: this process's share, if it was sampled ahead; None: it is sampled now.
    """
    world = loaded.policy.world
    places = list(range(len(prompts)))

    share = None if ahead is None else ahead.share

    def completions_of(own: Sequence[int]) -> list[list[Completion]]:
        nonlocal share
        if share is None:
            share = sample(
                loaded,
                reward,
                prompts,
                own,
                sampling=sampling,
                reward_type=objective.reward_type,
                seeds=prompt_seeds(seed, first + len(prompts))[first:],
            )
        return share.completions

    started = time.perf_counter()
    with loaded.ready_to_sample():
        completions = world.map(completions_of, places)
    sampled = time.perf_counter()
    assert share is not None
    early = share.early

    def score(own: Sequence[int]) -> list[tuple[list[str], Tensor, Tensor]]:
        if not own:  # more processes than prompts
            return []
        texts = [texts_of(loaded, prompts[n], completions[n]) for n in own]
        scores = reward.score_groups(
            [prompts[n].scored for n in own],
            texts,
            reward_type=objective.reward_type,
            places=own,
            early=early,
        )
        return list(zip(texts, scores.rewards_NK, scores.scores_FNG.unbind(1), strict=True))

    with reward.ready():
        scored_prompts = world.map(score, places)
    texts, rewards, scores = (list(column) for column in zip(*scored_prompts, strict=True))
    measured = world.each(reward.take_metrics) if reward.is_measured else []
    scored = GroupScores(torch.stack(rewards), torch.stack(scores, 1), reward.names)
    seconds = {"sample": sampled - started, "reward": time.perf_counter() - sampled}
    if early is not None:
        seconds["reward_overlapped"] = early.overlapped
    if ahead is not None:
        seconds |= {"sample": ahead.seconds, "wait": ahead.waited}
    return Rollout(
        prompts=prompts,
        completions=completions,
        texts=texts,
        rewards_NK=scored.rewards_NK,
        advantages_NK=advantages_of(prompts, scored.rewards_NK, objective),
        per_function=scored.per_function,
        seconds=seconds,
        staleness=None if ahead is None else ahead.staleness,
        scores_FNG=scored.scores_FNG,
        measured=measured,
    )
