"""Checks what a reward function returns: one number, or None, for every completion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from grao_fast.rewards.finding import RewardError

# Below this, sums of squared deviations cannot overflow float64.
LARGEST = 1e100

_LONGEST = 120  # characters of a value in an error


def check_values(name: str, values: Any, labels: Sequence[str]) -> list[float]:
    """Return a function's rewards as floats, with NaN for None; others raise RewardError.

    NumPy's numbers and tensors without dimensions count as numbers, True as 1 and False as 0.
    """
    count = len(labels)
    if not isinstance(values, (list, tuple)):
        raise RewardError(
            f"reward {name} returned a {type(values).__name__}: it must return a list of {count} "
            f"numbers" + ("; call .tolist() on it" if hasattr(values, "tolist") else "")
        )
    if len(values) != count:
        raise RewardError(
            f"reward {name} returned {len(values)} values for {count} completions: it must return "
            f"one for each"
        )
    return [
        math.nan if value is None else _check_value(name, value, label)
        for label, value in zip(labels, values, strict=True)
    ]


def _check_value(name: str, value: Any, label: str) -> float:
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(number, Real):
        raise RewardError(
            f"reward {name} returned {_short(value)} for {label}, a "
            f"{type(value).__name__}: it must be a number, or None for no reward"
        )
    if number != number or abs(number) == math.inf:
        raise RewardError(
            f"reward {name} returned {_short(value)} for {label}: it must be finite, or "
            f"None for no reward"
        )
    if abs(number) > LARGEST:
        raise RewardError(
            f"reward {name} returned {_short(number)} for {label}: beyond {LARGEST:g} mean and "
            f"deviation overflow; scale it down"
        )
    return float(number)


def _short(value: Any) -> str:
    if isinstance(value, int):  # Python does not print integers of more than 4300 digits
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:  # of any kind: the class may be the user's own
        return "a value that cannot be printed"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
