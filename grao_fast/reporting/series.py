"""Series of values over the steps of a run, and what plots make of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Series = tuple[list[int], list[float]]  # steps and values, NaN for a gap
Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl

_TERM = "objective/"  # what the names of an objective's terms begin with
_SHORT_RUN = 8  # fewer points than this are not smoothed


def series_of(rows: Rows, key: str) -> Series:
    """Return the steps and values of a metric, with NaN, which is drawn as a gap, for null."""
    found = [(row["step"], as_number(row[key])) for row in rows if key in row]
    if all(math.isnan(value) for _, value in found):
        return [], []
    return [step for step, _ in found], [value for _, value in found]


def as_number(value: Any) -> float:
    """Return a value of a metric as a finite float; NaN for all else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.nan
    return number if math.isfinite(number) else math.nan


def running_mean(values: Sequence[float]) -> list[float]:
    """Average over a centred window of about a tenth of the run, without NaN; copy short runs."""
    reach = 0 if len(values) < _SHORT_RUN else 1 + len(values) // 25
    means = []
    for index in range(len(values)):
        means.append(mean_of(values[max(0, index - reach) : index + reach + 1]))
    return means


def mean_of(values: Sequence[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    present = [value for value in values if not math.isnan(value)]
    return sum(present) / len(present) if present else math.nan


def components_of(rows: Rows) -> tuple[str, ...]:
    """Return the names of the objective's terms, in the order in which they were logged."""
    names = dict.fromkeys(key for row in rows for key in row if key.startswith(_TERM))
    return tuple(name.removeprefix(_TERM) for name in names)


def component_shares(rows: Rows) -> tuple[list[int], list[list[float]]]:
    """Return steps, and for each of `components_of` its share of their summed magnitudes.

    Steps without all of them, or in which all are 0, as in a step of dead groups, are left out. Of
    a single term there are no shares.
    """
    keys = [f"{_TERM}{name}" for name in components_of(rows)]
    steps, shares = [], []
    if len(keys) < 2:
        return [], []
    for row in rows:
        sizes = [abs(as_number(row.get(key))) for key in keys]
        total = sum(sizes)
        if not math.isnan(total) and total > 0:
            steps.append(row["step"])
            shares.append([size / total for size in sizes])
    return steps, [list(column) for column in zip(*shares, strict=True)]


def thinned(series: Series, most: int) -> Series:
    """Return at most about `most` points that look the same: each stretch's lowest and highest."""
    steps, values = series
    if len(steps) <= most:
        return series
    stretches = max(1, most // 2)
    bounds = [len(steps) * part // stretches for part in range(stretches + 1)]
    kept: set[int] = {0, len(steps) - 1}
    for start, end in pairwise(bounds):
        present = [i for i in range(start, end) if not math.isnan(values[i])]
        if not present:
            kept.add(start)  # a gap
            continue
        kept |= {min(present, key=values.__getitem__), max(present, key=values.__getitem__)}
    order = sorted(kept)
    return [steps[i] for i in order], [values[i] for i in order]
