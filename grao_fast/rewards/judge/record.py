"""What a judge has done since it was last asked: its metrics."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping

from grao_fast.rewards.judge.endpoint import Answer
from grao_fast.rewards.measured import Metrics

AMOUNTS = (
    "comparisons",
    "requests",
    "retries",
    "cached",
    "failed",
    "unparsable",
    "disagreements",
    "prompt_tokens",
    "completion_tokens",
)


class Record:
    """The metrics of a judge, which several threads add to.

    prices: of a million prompt and completion tokens; None: no cost is reported.
    """

    def __init__(self, prices: tuple[float, float] | None) -> None:
        self._prices = prices
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._amounts: dict[str, float] = dict.fromkeys(AMOUNTS, 0.0)
        if self._prices is not None:
            self._amounts["cost"] = 0.0
        self._values: dict[str, list[float]] = defaultdict(list)

    def count(self, **amounts: float) -> None:
        """Add to amounts."""
        with self._lock:
            for name, amount in amounts.items():
                self._amounts[name] += amount

    def value(self, **values: float) -> None:
        """Add a value of a thing that was measured, whose mean is reported."""
        with self._lock:
            for name, value in values.items():
                self._values[name].append(value)

    def answer(self, answer: Answer) -> None:
        """Add what an answer has taken."""
        self.count(prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens)
        if self._prices is not None:
            prompt, completion = self._prices
            cost = answer.prompt_tokens * prompt + answer.completion_tokens * completion
            self.count(cost=cost / 1e6)
        self.value(latency=answer.seconds)

    def take(self) -> Metrics:
        """Return the metrics, and start anew."""
        with self._lock:
            metrics: Mapping[str, float | list[float]] = {**self._amounts, **self._values}
            self._clear()
        return metrics
