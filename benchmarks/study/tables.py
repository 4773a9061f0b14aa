"""The study's tables, in Markdown, from its finished runs.

Every figure is a mean over seeds, with its 95% interval by Student's t: mean +- t s / sqrt(n).
Differences are paired by seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from study.plan import (
    BUDGET,
    GROUPS,
    MAIN,
    RATES,
    TASKS,
    TERMS,
    TUNING_SEED,
    VARIANTS,
    Record,
    chosen_rates,
    rate_owner,
)

EARLY = BUDGET.steps // 4
# The 97.5% quantile of Student's t, by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
_SCORES = {
    "in_place": "digits in place",
    "exact": "all in place",
    "ras": "RAS",
    "ras_win_or_tie": "RAS, ties count",
    "nag": "NAG",
}


class Runs:
    """The reported runs, by task, method and seed."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records
        self._reported: dict[tuple[str, str], dict[int, Record]] = {}
        rates = self.tuned()
        for record in records:
            run = record.run
            rate = rates.get((run.task, rate_owner(run.method)))
            if run.seed != TUNING_SEED and run.learning_rate == rate:
                self._reported.setdefault((run.task, run.method), {})[run.seed] = record

    def values(
        self, task: str, method: str, score: str, *, step: int = BUDGET.steps
    ) -> dict[int, float]:
        """A score after a step, by seed; empty without such runs."""
        found = self._reported.get((task, method), {})
        return {
            seed: next(point[score] for point in record.curve if point["step"] == step)
            for seed, record in sorted(found.items())
        }

    def differences(
        self, task: str, method: str, other: str, score: str, *, step: int = BUDGET.steps
    ) -> list[float]:
        """The score of a method less that of another, of the seeds that both have."""
        own = self.values(task, method, score, step=step)
        theirs = self.values(task, other, score, step=step)
        return [own[seed] - theirs[seed] for seed in own if seed in theirs]

    def curve(self, task: str, method: str, score: str) -> list[float]:
        """A score at every evaluation, as a mean over seeds."""
        curves = [record.curve for record in self._reported.get((task, method), {}).values()]
        return [
            statistics.mean(point[score] for point in points)
            for points in zip(*curves, strict=True)
        ]

    def tuned(self) -> dict[tuple[str, str], float]:
        """The learning rates that were chosen."""
        return chosen_rates(self._records)

    def tuning_scores(self, task: str, method: str) -> dict[float, float]:
        """The held-out reward of each learning rate; -inf where the gradient became infinite."""
        return {
            record.run.learning_rate: -math.inf if record.error else record.last["reward"]
            for record in self._records
            if record.run[:3] == (task, method, TUNING_SEED)
        }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and half the width of its 95% interval; of one value, NaN."""
    if len(values) < 2:
        return values[0], math.nan
    half = _T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def percent(values: Sequence[float], *, sign: bool = False) -> str:
    """Return a mean and its interval in percent."""
    if not values:
        return ""
    mean, half = interval(values)
    return f"{100 * mean:{'+' if sign else ''}.1f} ± {100 * half:.1f}"


def main_table(runs: Runs, task: str) -> str:
    """One task: the base model and all methods."""
    learned = TASKS[task].reward == "learned"
    names = [*_SCORES.values(), *(["learned reward"] if learned else [])]
    head = ["", "learning rate", *names, "digits, against GRAO", "tokens sampled", "CPU seconds"]
    base = [_score(runs.values(task, "GRAO", score, step=0), score) for score in _SCORES]
    base += _plain(runs.values(task, "GRAO", "reward", step=0)) if learned else []
    rows = [["base model", "", *base, "", "", ""]]
    for method in MAIN:
        cells = [_score(runs.values(task, method, score), score) for score in _SCORES]
        cells += _plain(runs.values(task, method, "reward")) if learned else []
        tokens = statistics.mean(runs.values(task, method, "sampled").values())
        seconds = statistics.mean(runs.values(task, method, "seconds").values())
        rate = f"{runs.tuned()[task, method]:g}"
        less = _against(method, runs.differences(task, method, "GRAO", "in_place"))
        rows.append([method, rate, *cells, less, f"{tokens / 1e3:.0f}k", f"{seconds:.1f}"])
    return _table(head, rows)


def variants_table(runs: Runs, score: str = "in_place") -> str:
    """GRAO's ways with the reference's advantage: scores early and late, and against signed."""
    steps = (EARLY, BUDGET.steps)
    head = ["task", "reference_advantage", "learning rate"]
    head += [name for step in steps for name in (f"step {step}", "against signed")]
    rows = []
    for task in TASKS:
        for method in ("GRAO", *VARIANTS):
            cells = []
            for step in steps:
                values = runs.values(task, method, score, step=step).values()
                less = runs.differences(task, method, "GRAO", score, step=step)
                cells += [
                    percent(list(values)),
                    "" if method == "GRAO" else percent(less, sign=True),
                ]
            name = method.partition(", ")[2] or "signed"
            rows.append([task, name, f"{runs.tuned()[task, method]:g}", *cells])
    return _table(head, rows)


def ablation_table(runs: Runs, methods: Mapping[str, object], full: str) -> str:
    """GRAO and ablations of it: digits in place and NAG, and paired differences from GRAO."""
    head = ["task", "", "digits in place", "against GRAO", "NAG", "against GRAO"]
    rows = []
    for task in TASKS:
        for method in ("GRAO", *methods):
            cells = []
            for score in ("in_place", "nag"):
                values = list(runs.values(task, method, score).values())
                less = runs.differences(task, method, "GRAO", score)
                sign = score == "nag"
                cells += [
                    percent(values, sign=sign),
                    "" if method == "GRAO" else percent(less, sign=True),
                ]
            if cells[0]:
                rows.append([task, full if method == "GRAO" else method, *cells])
    return _table(head, rows)


def tuning_table(runs: Runs) -> str:
    """The held-out reward on the tuning seed by learning rate; the chosen one is bold."""
    head = ["task", "", *(f"{rate:g}" for rate in RATES)]
    rows = []
    for task in TASKS:
        for method in (*MAIN, *VARIANTS):
            scores, best = runs.tuning_scores(task, method), runs.tuned()[task, method]
            cells = [f"{scores[rate]:.3f}" for rate in RATES]
            cells[RATES.index(best)] = f"**{cells[RATES.index(best)]}**"
            rows.append([task, method, *cells])
    return _table(head, rows)


def all_tables(runs: Runs) -> dict[str, str]:
    """Every table of the page, by heading."""
    return {
        **{TASKS[task].title: main_table(runs, task) for task in TASKS},
        "The reference's advantage": variants_table(runs),
        "Without one of the terms": ablation_table(runs, TERMS, "all terms"),
        "Samples of a prompt": ablation_table(runs, GROUPS, f"G = {BUDGET.num_generations}"),
        "Learning rates": tuning_table(runs),
    }


def _score(values: Mapping[int, float], score: str) -> str:
    return percent(list(values.values()), sign=score == "nag")


def _against(method: str, differences: Sequence[float]) -> str:
    return "" if method == "GRAO" else percent(differences, sign=True)


def _plain(values: Mapping[int, float]) -> list[str]:
    mean, half = interval(list(values.values()))
    return [f"{mean:.2f} ± {half:.2f}"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:" if name else "---" for name in head[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))
