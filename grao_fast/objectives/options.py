"""Checks of an objective's options, in its `__post_init__`; each raises UserError."""

from __future__ import annotations

import math
from collections.abc import Sequence

from grao_fast.system.errors import UserError, nearest


def check_number(
    objective: object,
    name: str,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
) -> None:
    """Raise UserError unless this option is a finite number between `least` and `most`."""
    value = getattr(objective, name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and least <= value <= most and value > above:
        return
    bounds = [
        *([f"at least {least}"] if least > -math.inf else []),
        *([f"above {above}"] if above > -math.inf else []),
        *([f"at most {most}"] if most < math.inf else []),
    ]
    wanted = " ".join(["a finite number", " and ".join(bounds)]).strip()
    raise UserError(f"{_named(objective, name)} must be {wanted}, got {value!r}")


def check_count(objective: object, name: str) -> None:
    """Raise UserError unless this option is a positive whole number."""
    value = getattr(objective, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{_named(objective, name)} must be a whole number from 1, got {value!r}")


def check_flag(objective: object, name: str) -> None:
    """Raise UserError unless this option is True or False."""
    value = getattr(objective, name)
    if not isinstance(value, bool):
        raise UserError(f"{_named(objective, name)} must be True or False, got {value!r}")


def check_choice(objective: object, name: str, choices: Sequence[str]) -> None:
    """Raise UserError unless this option is one of some words."""
    value = getattr(objective, name)
    if value not in choices:
        known = " or ".join(map(repr, choices))
        hint = nearest(value, choices) if isinstance(value, str) else ""
        raise UserError(f"{_named(objective, name)} must be {known}, got {value!r}{hint}")


def _named(objective: object, name: str) -> str:
    return f"{type(objective).__name__}'s {name}"
