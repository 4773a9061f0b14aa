"""What a reward offers besides scores: a check before the run, and metrics of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from grao_fast.rewards.finding import RewardFunction, running

Metrics = Mapping[str, float | list[float]]


@runtime_checkable
class Checked(Protocol):
    """A reward that can tell, before a run starts, that it would fail."""

    def check_ready(self) -> None:
        """Raise an error with its remedy; called once a process, before a model is loaded."""


@runtime_checkable
class Measured(Protocol):
    """A reward with metrics of its own, which stand beside its mean, as rewards/NAME/METRIC."""

    def take_metrics(self) -> Metrics:
        """Return what was measured since the last call, in this process: a step or an evaluation.

        A number is an amount, which is added up over the processes; a list holds one value for each
        thing that was measured, and their mean over all processes is reported.
        """
        ...


def check_ready(names: Sequence[str], functions: Sequence[RewardFunction]) -> None:
    """Check the rewards that can tell that they would fail. Raises RewardError if one would."""
    for name, function in zip(names, functions, strict=True):
        if isinstance(function, Checked):
            with running(f"check_ready of reward {name}"):
                function.check_ready()


def take_metrics(names: Sequence[str], functions: Sequence[RewardFunction]) -> Metrics:
    """Return the metrics of all rewards that have some, as rewards/NAME/METRIC."""
    taken: dict[str, float | list[float]] = {}
    for name, function in zip(names, functions, strict=True):
        if isinstance(function, Measured):
            with running(f"take_metrics of reward {name}"):
                metrics = function.take_metrics()
            taken |= {f"rewards/{name}/{key}": value for key, value in metrics.items()}
    return taken


def join_metrics(parts: Sequence[Metrics]) -> dict[str, float]:
    """Join the metrics of several processes: sums of amounts, means of lists that hold anything."""
    amounts: dict[str, float] = defaultdict(float)
    values: dict[str, list[float]] = defaultdict(list)
    for part in parts:
        for name, value in part.items():
            if isinstance(value, list):
                values[name].extend(value)
            else:
                amounts[name] += value
    means = {name: sum(each) / len(each) for name, each in values.items() if each}
    return {**amounts, **means}
