"""The result of an evaluation: means over prompts with intervals, and the scores of each prompt.

R(a, b) > 0 means that answer a is better than b. A pairwise reward gives R(a, b) itself, a
pointwise one as the difference R(a) - R(b). Over the prompts, with greedy answers o, references y,
and answers of the aligned model (post) and of the base model (pre):

    RAS              share with R(o, y) > 0
    ras_win_or_tie   share with R(o, y) >= 0
    NAG              (wins - losses) / all, of R(post, pre)
    nag_wins         share with R(post, pre) > 0

The paper (arXiv 2508.07750) counts a win in RAS as R > 0 in one place and R >= 0 in its appendix,
so both are reported. It defines NAG as the share with R(post) > R(pre), but its tables contain a
negative NAG, which a share cannot be: `nag` can be negative, and `nag_wins` is the share.

`pass_at_k` is defined in `pass_at_k.py`.

Intervals are 95% percentile bootstrap intervals over prompts, of 10,000 resamples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grao_fast.reporting.tables import PASS_AT, results_table

if TYPE_CHECKING:
    from rich.table import Table

METRICS = ("reward", "ras", "ras_win_or_tie", "nag", "nag_wins", "metric")


@dataclass(frozen=True)
class EvaluationResult:
    """Means over prompts; None if no prompt has a value.

    prompts: how many were evaluated.
    reward: mean of R(o), or of R(o, y) where the reward is pairwise.
    ras, ras_win_or_tie, nag, nag_wins: fractions, see the top of this module; RAS needs
        references, NAG completions of a base model.
    metric: mean of the held-out metric of the greedy answers.
    intervals: the 95% bootstrap interval (low, high) of every one that is not None.
    rows: the texts and scores of every prompt.
    pass_at_k: by k, the expected best metric of k samples; empty without samples.
    measured: the rewards' own metrics, and those of the held-out metric.
    """

    prompts: int
    reward: float | None
    ras: float | None
    ras_win_or_tie: float | None
    nag: float | None
    nag_wins: float | None
    metric: float | None
    intervals: dict[str, tuple[float, float]]
    rows: list[dict[str, Any]] = field(repr=False)
    pass_at_k: dict[int, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """The means that are not None, by name; those of `pass_at_k` as pass_at_1 and so on."""
        values = {name: getattr(self, name) for name in METRICS}
        values |= {f"{PASS_AT}{k}": value for k, value in self.pass_at_k.items()}
        return {name: value for name, value in values.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: prompts, the means that are not None, and `intervals`."""
        intervals = {name: list(interval) for name, interval in self.intervals.items()}
        plain = {"prompts": self.prompts, **self.metrics(), "intervals": intervals}
        return plain | ({"measured": self.measured} if self.measured else {})

    def table(self) -> Table:
        """A table for the terminal; rates in percent."""
        return results_table(self.prompts, self.metrics(), self.intervals)
