"""What three trainers share on one run: names, settings, a reward, and what is told of steps."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grao_fast.rewards.named import texts_of
from grao_fast.training.state import DataStream

GRPO, GRAO_IN_TRL, OURS = "grpo", "grao_trainer", "ours"
Sampling = Literal["own", "shared", "replayed", "replaced"]
Samples = list[tuple[list[int], list[int]]]  # ids of prompt and completion
LABELS = {
    GRPO: "TRL GRPOTrainer, no references",
    GRAO_IN_TRL: "TRL with GRAOTrainer",
    OURS: "`grao_fast.train`",
}
_LAST_NUMBER = re.compile(r"-?\d+(?!.*\d)", re.DOTALL)


@dataclass(frozen=True)
class Settings:
    """What the sides share. Each has a micro-batch a group, and recomputes nothing."""

    steps: int
    prompts: int = 2
    samples: int = 8
    new_tokens: int = 48
    temperature: float = 1.0
    learning_rate: float = 1e-6
    seed: int = 0


def order_of(rows: Sequence[Any], settings: Settings) -> DataStream:
    """The order in which `grao_fast.train` draws the rows."""
    return DataStream(len(rows), settings.prompts, settings.seed)


def tokens_of(samples: Samples) -> int:
    return sum(len(completion) for _, completion in samples)


def right_and_brief(
    completions: Sequence[Any], answer: Sequence[str], **columns: Any
) -> list[float]:
    """1 if the last number is the answer; and up to 0.2 more for an answer of few words."""
    return [
        float(_last_number(text) == expected) + 0.2 * max(0.0, 1 - len(text.split()) / 40)
        for text, expected in zip(texts_of(completions), answer, strict=True)
    ]


def _last_number(text: str) -> str | None:
    found = _LAST_NUMBER.search(text)
    return None if found is None else found[0]


class Run:
    """Is told of the steps of a run, counted from 0.

    said: the texts that were scored in the step that is under way, references included.
    sampled: ids of prompt and completion of each of its samples.
    """

    def __init__(self) -> None:
        self.said: list[str] = []
        self.sampled: Samples = []

    def begin(self, step: int) -> None:
        """Called before a step."""
        self.said.clear()

    def end(self, step: int, figures: dict[str, float]) -> None:
        """Called after it, with seconds by phase, metrics and sampled tokens."""

    def reward(self) -> Callable[..., list[float]]:
        """`right_and_brief`, which keeps what it scores."""

        @functools.wraps(right_and_brief)
        def reward(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list:
            self.said += texts_of(completions)
            return right_and_brief(completions, answer)

        return reward
