"""The rollouts of a run: each step's prompts, sampled and scored, with dead groups refilled.

A group whose rewards are all equal, or absent, weighs nothing: it has cost samples and teaches
nothing. With `dynamic_sampling`, such groups are replaced by groups of the prompts that come next,
which may be dead in turn, for so many rounds at most. What is dead then stays in the step, where it
counts as any group does when the loss is averaged over prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from grao_fast.config import GRAOConfig
from grao_fast.data.encoding import Encoded
from grao_fast.rewards import Reward
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.sampling.seeds import prompt_seeds
from grao_fast.training.ahead import Sampled, Share
from grao_fast.training.draws import PromptDraws
from grao_fast.training.rollout import (
    Rollout,
    advantages_of,
    references_only,
    sample,
    sample_and_score,
)
from grao_fast.training.state import step_seed
from grao_fast.training.stored import stored_rollout


class Rollouts:
    """Makes the rollouts of a run; every process makes all of them, and samples its share.

    Args:
        reward: None where the objective needs no samples, or all rewards are stored.
        prompts: of the run.
        draws: which of them a step takes.
    """

    def __init__(
        self,
        loaded: LoadedPolicy,
        reward: Reward | None,
        prompts: Sequence[Encoded],
        draws: PromptDraws,
        config: GRAOConfig,
    ) -> None:
        self._loaded, self._reward, self._prompts = loaded, reward, prompts
        self._draws, self._config = draws, config

    def share(self, step: int) -> Share:
        """This process's share of a step's prompts, to be sampled ahead in a thread."""
        prompts = self._of(self._draws.planned(step))
        assert self._reward is not None, "samples are scored"
        return sample(
            self._loaded,
            self._reward,
            prompts,
            self._loaded.policy.world.share(range(len(prompts))),
            sampling=self._config.sampling,
            reward_type=self._config.reward_type,
            seeds=prompt_seeds(self._seed(step), len(prompts)),
            alone=False,
        )

    def make(self, step: int, ahead: Sampled | None) -> Rollout:
        """The rollout of a step; ahead: as in `sample_and_score`."""
        indices = self._draws.batch(step)
        rollout = self._sample(step, indices, ahead=ahead)
        made, sampled = [rollout], list(zip(indices, rollout.dead_N.tolist(), strict=True))
        refilled = 0
        while rollout.dead_N.any() and len(made) <= self._config.dynamic_sampling:
            dead = rollout.dead_N.nonzero().flatten().tolist()
            indices = self._draws.more(len(dead))
            other = self._sample(step, indices, first=len(sampled))
            made.append(other)
            sampled += zip(indices, other.dead_N.tolist(), strict=True)
            live = (~other.dead_N).nonzero().flatten().tolist()
            rollout = rollout.replaced(dead[: len(live)], other, live)
            refilled += len(live)
        self._draws.tell(sampled)
        if refilled:  # an advantage may depend on all rewards of the step
            objective = self._config.objective_options
            advantages_NK = advantages_of(rollout.prompts, rollout.rewards_NK, objective)
            rollout = replace(rollout, advantages_NK=advantages_NK)
        return replace(rollout, counts=self._counts(made, refilled))

    def _sample(
        self, step: int, indices: Sequence[int], *, first: int = 0, ahead: Sampled | None = None
    ) -> Rollout:
        prompts, objective = self._of(indices), self._config.objective_options
        if not objective.formula.needs_samples:
            return references_only(prompts, objective)
        if self._config.sampler == "dataset":
            return stored_rollout(
                self._loaded,
                self._reward,
                prompts,
                num_generations=self._config.num_generations,
                objective=objective,
            )
        assert self._reward is not None, "`read_inputs` asks for it"
        return sample_and_score(
            self._loaded,
            self._reward,
            prompts,
            sampling=self._config.sampling,
            objective=objective,
            seed=self._seed(step),
            first=first,
            ahead=ahead,
        )

    def _of(self, indices: Sequence[int]) -> list[Encoded]:
        return [self._prompts[index] for index in indices]

    def _seed(self, step: int) -> int:
        return step_seed(self._config.seed, step)

    def _counts(self, made: Sequence[Rollout], refilled: int) -> dict[str, float]:
        """Metrics of what was drawn and sampled; made: the rollout of every round."""
        counts: dict[str, float] = {}
        if self._config.dynamic_sampling:
            groups = sum(len(each.prompts) for each in made)
            samples_MG = torch.cat([each.rewards_NK[:, :-1] for each in made])
            counts = {
                "rounds": len(made) - 1,
                "refilled": refilled,
                "groups": groups,
                "tokens": sum(each.sampled_tokens for each in made),
                "frac_dead": sum(int(each.dead_N.sum()) for each in made) / groups,
                "reward": float(samples_MG.nanmean()),
            }
        counts = {f"dynamic_sampling/{name}": value for name, value in counts.items()}
        if self._config.curriculum:
            counts["curriculum/passed_over"] = self._draws.passed_over
            counts["curriculum/resting"] = self._draws.resting
        return counts
