"""Samples a few prompts and scores them beside their references, whatever the rewards do.

Suffixes: N prompts, G samples, K = G + 1 sequences of a prompt, the reference last, F functions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from grao_fast.config import ObjectiveOptions, RewardType, SamplingOptions
from grao_fast.data.encoding import Encoded
from grao_fast.rewards import Reward, RewardError
from grao_fast.rewards.functions import ready
from grao_fast.rewards.measured import join_metrics
from grao_fast.sampling import Completion
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.sampling.seeds import prompt_seeds
from grao_fast.system.errors import one_line
from grao_fast.training.rollout import Rollout, advantages_of, references_only, texts_of
from grao_fast.training.stored import completions_of as stored_completions
from grao_fast.training.stored import score_stored

_PATIENCE = 20.0  # seconds after which no further prompt is tried with a reward that has failed
_LONGEST = 400  # characters of an error that is shown


class Failed(NamedTuple):
    """How often a reward failed, and what it said first.

    prompts, tried: of the prompts that were scored one by one afterwards.
    """

    prompts: int
    tried: int
    message: str


@dataclass(frozen=True)
class GroupFacts:
    """Samples of a few prompts, and their rewards.

    rollout: as a step of training has it; NaN where a reward failed.
    names, scores_FNG: the functions and the scores that each gave the samples; NaN for none.
    failed: None if no reward failed.
    ends: the last tokens of the samples that ended.
    measured: the reward functions' own metrics.
    """

    rollout: Rollout
    names: list[str]
    scores_FNG: Tensor
    failed: Failed | None
    ends: list[str]
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def completions(self) -> list[Completion]:
        """All samples."""
        return [each for group in self.rollout.completions for each in group]

    @property
    def samples_NG(self) -> Tensor:
        """The rewards of the samples."""
        return self.rollout.rewards_NK[:, :-1]

    @property
    def reference_N(self) -> Tensor:
        """The rewards of the references."""
        return self.rollout.rewards_NK[:, -1]


def sample_and_try(
    loaded: LoadedPolicy,
    reward: Reward | None,
    prompts: Sequence[Encoded],
    *,
    sampling: SamplingOptions,
    objective: ObjectiveOptions,
    seed: int,
    stored: bool = False,
) -> GroupFacts:
    """Sample the prompts and try the rewards on them; every process does its share.

    stored: the completions are those of the prompts' rows; the reward scores what has none.
    """
    world, places = loaded.policy.world, range(len(prompts))
    seeds = prompt_seeds(seed, len(prompts))

    def completions_of(own: Sequence[int]) -> list[list[Completion]]:
        return loaded.sampler.sample(
            [prompts[n].prompt_ids for n in own],
            num_generations=sampling.num_generations,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seeds=[seeds[n] for n in own],
        )

    started = time.perf_counter()
    if stored:
        completions = [stored_completions(prompt) for prompt in prompts]
    else:
        with loaded.ready_to_sample():
            completions = world.map(completions_of, places)
    sampled = time.perf_counter()

    def score(own: Sequence[int]) -> list[_Scored]:
        texts = [texts_of(loaded, prompts[n], completions[n]) for n in own]
        trial = _Trial(
            reward,
            objective.reward_type,
            prompts,
            dict(zip(own, texts, strict=True)),
            num_generations=sampling.num_generations,
            stored=stored,
        )
        return trial.run(own) if own else []

    with ready(reward):
        scored = world.map(score, places)
    seconds = {} if stored else {"sample": sampled - started}
    seconds["reward"] = time.perf_counter() - sampled
    measures = reward is not None and reward.is_measured
    measured = world.each(reward.take_metrics) if reward is not None and measures else []
    rewards_NK = torch.stack([each.rewards_K for each in scored])
    last = [each.token_ids[-1] for group in completions for each in group if each.finished]
    return GroupFacts(
        rollout=Rollout(
            prompts=prompts,
            completions=completions,
            texts=[each.texts for each in scored],
            rewards_NK=rewards_NK,
            advantages_NK=advantages_of(prompts, rewards_NK, objective),
            per_function={},
            seconds=seconds,
        ),
        names=[] if reward is None else reward.names,
        scores_FNG=torch.stack([each.scores_FG for each in scored], dim=1),
        failed=_failed(scored),
        ends=loaded.tokenizer.convert_ids_to_tokens(last),
        measured=join_metrics(measured),
    )


def unsampled(prompts: Sequence[Encoded], objective: ObjectiveOptions) -> GroupFacts:
    """The groups of an objective that needs no samples."""
    rollout = references_only(prompts, objective)
    nothing_FNG = torch.empty(0, len(prompts), 0, dtype=torch.float64)
    return GroupFacts(rollout, names=[], scores_FNG=nothing_FNG, failed=None, ends=[])


class _Scored(NamedTuple):
    """A group's texts and rewards.

    together: what a reward said when it failed on all prompts of the process; None: it did not.
    alone: what it said when it failed on this one alone; None: it did not, or was not tried.
    """

    texts: list[str]
    rewards_K: Tensor
    scores_FG: Tensor
    together: str | None = None
    alone: str | None = None
    tried: bool = True


@dataclass(frozen=True)
class _Trial:
    """The scoring of one process's prompts.

    texts: of the samples, by the place of their prompt.
    stored: whether completions are stored, with rewards.
    """

    reward: Reward | None
    reward_type: RewardType
    prompts: Sequence[Encoded]
    texts: dict[int, list[str]]
    num_generations: int
    stored: bool

    def run(self, own: Sequence[int]) -> list[_Scored]:
        """Score all prompts in one call, as a step does; if that fails, one by one."""
        started = time.monotonic()
        try:
            return self._score(own)
        except RewardError as error:
            message = _message(error)
        if len(own) == 1:
            return [self._absent(n)._replace(together=message, alone=message) for n in own]
        scored: list[_Scored] = []
        for n in own:
            if time.monotonic() - started > _PATIENCE:
                scored.append(self._absent(n)._replace(tried=False))
                continue
            try:
                scored += self._score([n])
            except RewardError as error:
                scored.append(self._absent(n)._replace(alone=_message(error)))
        return [each._replace(together=message) for each in scored]

    def _score(self, places: Sequence[int]) -> list[_Scored]:
        texts = [self.texts[n] for n in places]
        if self.stored:
            scores = score_stored(
                self.reward,
                [self.prompts[n] for n in places],
                texts,
                num_generations=self.num_generations,
                reward_type=self.reward_type,
                places=places,
            )
        else:
            assert self.reward is not None, "samples are scored"
            scores = self.reward.score_groups(
                [self.prompts[n].scored for n in places],
                texts,
                reward_type=self.reward_type,
                places=places,
            )
        groups = zip(texts, scores.rewards_NK, scores.scores_FNG.unbind(1), strict=True)
        return [_Scored(*group) for group in groups]

    def _absent(self, n: int) -> _Scored:
        """A group without rewards."""
        G, F = self.num_generations, 0 if self.reward is None else len(self.reward.names)
        rewards_K = torch.full((G + 1,), math.nan, dtype=torch.float64)
        return _Scored(self.texts[n], rewards_K, torch.full((F, G), math.nan, dtype=torch.float64))


def _message(error: RewardError) -> str:
    return one_line(error, _LONGEST) + (f" ({error.place})" if error.place else "")


def _failed(scored: Sequence[_Scored]) -> Failed | None:
    messages = [each.together for each in scored if each.together is not None]
    if not messages:
        return None
    tried = [each for each in scored if each.tried]
    return Failed(sum(each.alone is not None for each in tried), len(tried), messages[0])
