"""Rewards that are objects: their name, the columns that they take, and their identity."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from grao_fast.data.examples import Example
from grao_fast.data.fields import answer_text
from grao_fast.rewards.finding import RewardError, RewardFunction, function_name

_ARGUMENTS = ("prompts", "completions")


class NamedReward:
    """The base of rewards that are objects.

    Their call takes `**columns`, as rewards do, and their signature names those that they need, so
    that a dataset which lacks one is refused before a model is loaded.

    identity: name and settings, which a checkpoint states: no run is resumed with others.
    """

    __name__: str

    def __init__(self, name: str, *, takes: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Name the reward.

        Args:
            name: in metrics and errors.
            takes: names of its arguments.
            settings: what its scores depend on.
        """
        if not isinstance(name, str) or not name.strip():
            raise RewardError(f"the name of a reward must be text that is not blank, got {name!r}")
        self.__name__ = name
        stated = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        self.identity = f"{name}({stated})"
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.__signature__ = inspect.Signature([inspect.Parameter(each, kind) for each in takes])

    def check(self, examples: Sequence[Example]) -> None:
        """Raise UserError for examples that cannot be scored, before a model is loaded."""


class CountedReward(NamedReward):
    """A reward that counts what it could not score, in metrics of its own: rewards/NAME/COUNT.

    counts: since the last call of `take_metrics`.
    """

    def __init__(
        self, name: str, *, takes: Sequence[str], settings: Mapping[str, Any], counts: Sequence[str]
    ) -> None:
        """Name the reward and what it counts; see `NamedReward`."""
        super().__init__(name, takes=takes, settings=settings)
        self.counts = dict.fromkeys(counts, 0.0)

    def take_metrics(self) -> dict[str, float]:
        """Return the counts, and begin anew; see `grao_fast.rewards.measured.Measured`."""
        taken, self.counts = self.counts, dict.fromkeys(self.counts, 0.0)
        return taken


def identity(function: RewardFunction) -> str:
    """What a checkpoint states of a reward: its name, and its settings if they are known."""
    return function.identity if isinstance(function, NamedReward) else function_name(function)


def check_column(column: object) -> str:
    """Return the name of a column; raise RewardError for what cannot be one."""
    if not isinstance(column, str) or not column.isidentifier() or column in _ARGUMENTS:
        raise RewardError(
            f"column must be the name of a column of the dataset, or references; got {column!r}"
        )
    return column


def texts_of(completions: Sequence[str | list[dict[str, Any]]]) -> list[str]:
    """The texts of completions; of messages, the last content."""
    return [answer_text(completion) or "" for completion in completions]


def accepted_answers(value: Any, where: str) -> list[str]:
    """The answers that a column holds for one text: none, one, or several that all count.

    Numbers are written as Python writes them.
    """
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], Mapping):  # references, where prompts are messages
            return [answer_text(list(value)) or ""]
        return [answer for each in value for answer in accepted_answers(each, where)]
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if not isinstance(value, (str, int, float)):
        raise RewardError(
            f"{where} holds a {type(value).__name__}: it must hold text, numbers or lists of these"
        )
    return [value] if isinstance(value, str) else [str(value)]
