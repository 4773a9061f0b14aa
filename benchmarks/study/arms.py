"""What a method of the study is, what it is given, and what it is measured by.

A method ("arm") trains `problem.model` in place, once on every prompt that all methods train on,
within one budget, and calls `meter.step` after every step:

    def dpo(problem: Problem, *, learning_rate: float, meter: Meter) -> None: ...

It uses AdamW with the trainer's betas and weight decay, gradients clipped to norm 1, and a learning
rate that falls to 0 by a cosine over the steps, as `grao_fast.train` does here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from grao_fast.data.examples import Example
from grao_fast.demo.task import LENGTH, in_place
from grao_fast.evaluation.compare import evaluate_completions

Rows = Sequence[dict[str, str]]
Reward = Callable[..., list[float | None]]


@dataclass(frozen=True)
class Budget:
    """What every method of a task may use.

    steps: optimiser steps; a method that takes several updates on one batch counts one step.
    prompts_per_step: prompts of a step.
    num_generations: G, samples of a prompt, for methods that sample.
    temperature: of sampling; top_k and top_p are off.
    max_new_tokens: of a sample, its end included.
    eval_steps: steps between evaluations.
    """

    steps: int = 64
    prompts_per_step: int = 16
    num_generations: int = 8
    temperature: float = 1.0
    max_new_tokens: int = LENGTH + 1
    eval_steps: int = 8


@dataclass(frozen=True)
class Problem:
    """A task and a seed: what all methods share.

    model: the base model, this run's own copy, to be trained in place; in float32 on the CPU.
    rows: the prompts to train on, with `prompt` and `reference`: as many as all steps take, so
        that each is used once, in whatever order a method takes them.
    held_out: the prompts that are evaluated.
    reward: f(prompts, completions) -> one number each, scores samples and references alike.
    """

    model: Qwen3ForCausalLM
    tokenizer: PreTrainedTokenizerFast
    rows: Rows
    held_out: Rows
    reward: Reward
    budget: Budget
    seed: int


class Point(NamedTuple):
    """Greedy answers to the held-out prompts after a step, and what training cost until then.

    sampled: tokens that were sampled, the ends of answers included.
    seconds: CPU time of training, sampling included and evaluations left out.
    in_place, exact: the share of digits in place, and of answers that are right.
    reward, ras, ras_win_or_tie, nag: by the problem's reward; see `grao_fast.evaluation.result`.
    """

    step: int
    sampled: int
    seconds: float
    in_place: float
    exact: float
    reward: float
    ras: float
    ras_win_or_tie: float
    nag: float


class Arm(Protocol):
    """A method; see the top of this module."""

    def __call__(self, problem: Problem, *, learning_rate: float, meter: Meter) -> None: ...


@dataclass
class Meter:
    """Counts tokens and CPU seconds of a run, and evaluates the model as it goes.

    A meter evaluates the base model when it is made, and its clock runs from then on. Whatever an
    arm does from there to its last step is training; see `restart`.
    """

    problem: Problem
    curve: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._done, self._sampled, self._seconds = 0, 0, 0.0
        self._base = self.answers()
        self._evaluate()
        self._started = time.process_time()

    def restart(self) -> None:
        """Set the clock to 0: what an arm did until now, such as imports, is not training."""
        assert self._done == 0, "training has begun"
        self._started = time.process_time()

    def step(self, *, sampled: int) -> None:
        """Count a finished step, for which so many tokens were sampled; evaluate if it is due."""
        self._done += 1
        self._sampled += sampled
        budget = self.problem.budget
        if self._done % budget.eval_steps == 0 or self._done == budget.steps:
            self._seconds += time.process_time() - self._started
            self._evaluate()
            self._started = time.process_time()

    def _evaluate(self) -> None:
        """Add a point to the curve."""
        prompts = [row["prompt"] for row in self.problem.held_out]
        answers = self.answers()
        result = evaluate_completions(
            self.problem.reward,
            [Example(r["prompt"], r["reference"], {}) for r in self.problem.held_out],
            answers,
            baseline=self._base,
            reward_type="pointwise",
        )
        shares = in_place(prompts, answers)
        scores = (result.reward, result.ras, result.ras_win_or_tie, result.nag)
        assert None not in scores, "the reward scores every answer"
        self.curve.append(
            Point(
                self._done,
                self._sampled,
                self._seconds,
                sum(shares) / len(shares),
                sum(share == 1 for share in shares) / len(shares),
                *scores,
            )
        )

    @torch.no_grad()
    def answers(self) -> list[str]:
        """The model's greedy answers to the held-out prompts, which all have one length."""
        model, tokenizer = self.problem.model, self.problem.tokenizer
        texts = [row["prompt"] for row in self.problem.held_out]
        ids_BL = torch.tensor(tokenizer(texts)["input_ids"])
        training = model.training
        model.eval()
        tokens_BL = model.generate(
            ids_BL,
            attention_mask=torch.ones_like(ids_BL),
            do_sample=False,
            max_new_tokens=self.problem.budget.max_new_tokens,
        )
        model.train(training)
        return tokenizer.batch_decode(tokens_BL[:, ids_BL.shape[1] :], skip_special_tokens=True)
