"""Samples and rewards of a step, for methods that `grao_fast.train` does not have.

The order of the prompts, the sampler and its seeds are those of `grao_fast.train`, so that until
its first update a method has the samples of every other.

Suffixes: N prompts, G samples, K = G + 1 answers to a prompt, the reference last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grao_fast.config import GRAOConfig
from grao_fast.sampling import Completion
from grao_fast.sampling.loading import load_policy
from grao_fast.sampling.seeds import prompt_seeds
from grao_fast.training.state import DataStream, step_seed
from study.arms import Problem
from study.family import FIXED, SAMPLING


def config_of(problem: Problem, *, learning_rate: float) -> GRAOConfig:
    """The options that all methods of a problem have alike."""
    budget = problem.budget
    return GRAOConfig(
        **FIXED,
        **SAMPLING,
        num_generations=budget.num_generations,
        prompts_per_step=budget.prompts_per_step,
        max_steps=budget.steps,
        temperature=budget.temperature,
        max_new_tokens=budget.max_new_tokens,
        learning_rate=learning_rate,
        seed=problem.seed,
    )


@dataclass(frozen=True)
class Samples:
    """The samples of a step, their texts as rewards see them, and the rewards.

    prompt_ids: N lists of tokens.
    completions, texts: N lists of G.
    rewards_NK: float64; NaN where there is none.
    """

    prompts: list[str]
    references: list[str]
    prompt_ids: list[list[int]]
    completions: list[list[Completion]]
    texts: list[list[str]]
    rewards_NK: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of all completions, their ends included."""
        return sum(len(c.token_ids) for group in self.completions for c in group)


class Sampling:
    """Samples G completions for each prompt of a step, from the problem's model as it is."""

    def __init__(self, problem: Problem, config: GRAOConfig) -> None:
        self.problem, self.config = problem, config
        self.loaded = load_policy(problem.model, config=config, tokenizer=problem.tokenizer)
        self._stream = DataStream(len(problem.rows), config.prompts_per_step, config.seed)

    def step(self, step: int) -> Samples:
        """The samples of a step."""
        rows = [self.problem.rows[index] for index in self._stream.batch(step)]
        prompts = [row["prompt"] for row in rows]
        references = [row["reference"] for row in rows]
        ids = self.problem.tokenizer(prompts)["input_ids"]
        G = self.config.num_generations
        completions = self.loaded.sampler.sample(
            ids,
            num_generations=G,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            seeds=prompt_seeds(step_seed(self.config.seed, step), len(rows)),
        )
        texts = [self.loaded.decode([i] * G, g) for i, g in zip(ids, completions, strict=True)]
        answers = [text for group, y in zip(texts, references, strict=True) for text in [*group, y]]
        scores = self.problem.reward([p for p in prompts for _ in range(G + 1)], answers)
        rewards = [torch.nan if score is None else score for score in scores]
        rewards_NK = torch.tensor(rewards, dtype=torch.float64).view(len(rows), G + 1)
        return Samples(prompts, references, ids, completions, texts, rewards_NK)
