"""The tasks: sort eight digits, in four regimes that the paper argues from.

weak base      sound references, and a base model that has hardly learned the task
strong base    a base model that is mostly right, and the demo's flawed references
rare rewards   sound references, and a reward that is 1 only if every digit is in place
learned reward flawed references, and a reward model that has learned from noisy preferences;
               digits in place are measured, and never seen in training
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from study.arms import Budget, Problem, Reward, Rows

from grao_fast.demo.base_model import imitate, make_model, make_tokenizer
from grao_fast.demo.task import in_place, make_rows, solution

HELD_OUT = 200
SHOWN = 3000  # the prompts on which base models are pretrained; no method trains on them


@dataclass(frozen=True)
class Task:
    """A regime.

    pretraining_steps: of the base model, on batches of 64 references.
    pretrained_on: "solutions", or the demo's "flawed" references.
    references: what the methods are given, likewise.
    reward: scores samples and references alike.
    """

    pretraining_steps: int
    pretrained_on: str
    references: str
    reward: str = "in place"

    def problem(self, seed: int, budget: Budget) -> Problem:
        """The base model, the data and the reward of a seed."""
        count = budget.steps * budget.prompts_per_step
        rows = make_rows(SHOWN + count + HELD_OUT, seed=seed)
        shown = _with(rows[:SHOWN], self.pretrained_on)
        rows = _with(rows[SHOWN:], self.references)
        tokenizer = make_tokenizer()
        model = make_model(tokenizer, seed=seed)
        imitate(model, tokenizer, shown, steps=range(self.pretraining_steps), seed=seed)
        return Problem(
            model, tokenizer, rows[:count], rows[count:], REWARDS[self.reward], budget, seed
        )


def all_in_place(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """1 if every digit is in place, else 0."""
    pairs = zip(prompts, completions, strict=True)
    return [float(completion == solution(prompt)) for prompt, completion in pairs]


def _with(rows: Rows, references: str) -> Rows:
    """Rows with solutions as references, or as they are: "flawed"."""
    if references == "flawed":
        return rows
    return [{**row, "reference": solution(row["prompt"])} for row in rows]


REWARDS: dict[str, Reward] = {"in place": in_place, "all in place": all_in_place}
TASKS = {
    "weak base": Task(10, "solutions", "solutions"),
    "strong base": Task(60, "solutions", "flawed"),
    "rare rewards": Task(25, "solutions", "solutions", "all in place"),
}
