"""The check of an objective's numbers, in its `__post_init__`."""

from __future__ import annotations

import math

from grao_fast.system.errors import UserError


def check_number(
    objective: object,
    name: str,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Raise UserError unless this option is a finite number within the bounds that are given."""
    value = getattr(objective, name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and least <= value <= most and above < value < below:
        return
    bounds = [
        *([f"at least {least}"] if least > -math.inf else []),
        *([f"above {above}"] if above > -math.inf else []),
        *([f"at most {most}"] if most < math.inf else []),
        *([f"below {below}"] if below < math.inf else []),
    ]
    wanted = " and ".join(bounds) or "a finite number"
    raise UserError(f"{type(objective).__name__}'s {name} must be {wanted}, got {value!r}")
