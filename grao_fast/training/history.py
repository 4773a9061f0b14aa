"""The logged steps of a run that a diagnosis looks at: the first ones and the latest."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from grao_fast.config import ReferenceAdvantage

FIRST = 5  # logged steps that later ones are compared with
LATEST = 10  # logged steps whose mean is judged

Row = Mapping[str, float]


class History:
    """The first and the latest logged steps of a run.

    objective: that of the run; only GRAO has A_y.
    reference_advantage: GRAO's, see `GRAOConfig`.
    best_logprob: the highest mean of `reference/logprob` over latest steps; NaN without one.
    """

    def __init__(
        self, objective: str = "grao", reference_advantage: ReferenceAdvantage = "floor"
    ) -> None:
        self.objective, self.reference_advantage = objective, reference_advantage
        self._first: list[Row] = []
        self._latest: deque[Row] = deque(maxlen=LATEST)
        self.steps = 0
        self.best_logprob = math.nan

    def add(self, row: Row) -> None:
        """Add the metrics of a logged step."""
        self.steps += 1
        if len(self._first) < FIRST:
            self._first.append(row)
        self._latest.append(row)
        logprobs = (self.best_logprob, self.latest("reference/logprob"))
        self.best_logprob = max((x for x in logprobs if not math.isnan(x)), default=math.nan)

    def now(self, name: str) -> float:
        """The metric of the last step; NaN without one."""
        return self._latest[-1].get(name, math.nan)

    def has(self, name: str) -> bool:
        """Whether the last step has a metric, NaN or not."""
        return name in self._latest[-1]

    def earliest(self, name: str, allowed: Callable[[Row], bool] = lambda row: True) -> float:
        """The first value of a metric within the first steps; NaN without one."""
        values = (row.get(name, math.nan) for row in self._first if allowed(row))
        return next((value for value in values if not math.isnan(value)), math.nan)

    def first(self, name: str) -> float:
        """The mean of the first steps; NaN while the latest steps include one of them."""
        return math.nan if self.steps < FIRST + LATEST else _mean(self._first, name)

    def latest(self, name: str) -> float:
        """The mean of the latest steps; NaN if there are too few."""
        return math.nan if self.steps < LATEST else _mean(self._latest, name)


def _mean(rows: Iterable[Row], name: str) -> float:
    """The mean over rows of a metric; NaN if more than half of them lack it."""
    values = [row.get(name, math.nan) for row in rows]
    present = [value for value in values if not math.isnan(value)]
    return sum(present) / len(present) if 2 * len(present) >= len(values) else math.nan
