"""The tasks: sort eight digits, in regimes that the paper argues from.

weak base        sound references, and a base model that has hardly learned the task
weak, flawed     the demo's: a base model that has imitated flawed references a little, and
                 references of that kind, which its samples come to beat halfway
strong base      a base model whose samples mostly beat the references, which are flawed
rare rewards     sound references, and a reward that is 1 only if every digit is in place, which
                 few samples get
learned reward   flawed references, and a reward model that has learned from noisy preferences;
                 digits in place are measured, and never seen in training
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerFast

from grao_fast.demo.base_model import imitate, make_tokenizer
from grao_fast.demo.task import in_place, make_rows, solution
from study.arms import Budget, Problem, Reward, Rows
from study.model import make_model, trained_once
from study.preferences import learned_reward

HELD_OUT = 200
SHOWN = 3000  # the prompts of base models and reward models; no method trains on them


@dataclass(frozen=True)
class Task:
    """A regime.

    title: what is particular about it, in a line.
    pretraining_steps: of the base model, each on 64 prompts with answers.
    flawed_share: of these answers; the others are solutions.
    references: what the methods are given: "sound", solutions, or "flawed", as in the demo.
    reward: scores samples and references alike.
    """

    title: str
    pretraining_steps: int
    flawed_share: float
    references: Literal["sound", "flawed"]
    reward: Literal["in place", "all in place", "learned"]

    def problem(self, seed: int, budget: Budget, *, folder: Path) -> Problem:
        """The base model, the data and the reward of a seed.

        folder: keeps the weights of base models and reward models.
        """
        count = budget.steps * budget.prompts_per_step
        rows = make_rows(SHOWN + HELD_OUT + count, seed=seed)
        shown, rows = rows[:SHOWN], rows[SHOWN:]
        sound = SHOWN - round(self.flawed_share * SHOWN)
        shown = _sound(shown[:sound]) + shown[sound:]
        if self.references == "sound":
            rows = _sound(rows)
        tokenizer = make_tokenizer()
        model = make_model(tokenizer, seed=seed)
        steps = range(self.pretraining_steps)
        trained_once(
            model,
            lambda: imitate(model, tokenizer, shown, steps=steps, seed=seed),
            f"base-{self.flawed_share:g}-{len(steps)}-{seed}",
            folder,
        )
        return Problem(
            model,
            tokenizer,
            rows[HELD_OUT:],
            rows[:HELD_OUT],
            self._reward(shown, tokenizer, seed, folder),
            budget,
            seed,
        )

    def _reward(
        self,
        shown: Rows,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        folder: Path,
    ) -> Reward:
        if self.reward == "learned":
            return learned_reward(_sound(shown), tokenizer, seed=seed, folder=folder)
        return in_place if self.reward == "in place" else all_in_place


def all_in_place(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """1 if every digit is in place, else 0."""
    pairs = zip(prompts, completions, strict=True)
    return [float(completion == solution(prompt)) for prompt, completion in pairs]


def _sound(rows: Rows) -> list[dict[str, str]]:
    """Rows with solutions as references."""
    return [{**row, "reference": solution(row["prompt"])} for row in rows]


TASKS = {
    "weak base": Task("A weak base, sound references", 25, 0.0, "sound", "in place"),
    "weak, flawed": Task("A weak base, flawed references", 40, 1.0, "flawed", "in place"),
    "strong base": Task("A strong base, flawed references", 150, 0.5, "flawed", "in place"),
    "rare rewards": Task("Rare rewards, sound references", 35, 0.0, "sound", "all in place"),
    "learned reward": Task("A learned reward, flawed references", 100, 0.5, "flawed", "learned"),
}
