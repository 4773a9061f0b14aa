"""What a check says about one measurement, and the table of limits by which shares are judged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

Verdict = Literal["ok", "warning", "failure"]
Part = Literal["run", "data", "samples", "rewards", "step"]

_ANY = math.ulp(0.0)  # a single case is enough
_NEVER = math.inf


@dataclass(frozen=True)
class Finding:
    """One line of a check.

    part: the part of the check that it belongs to.
    name: what was looked at.
    value: what was measured.
    remedy: what to do about it; empty if the verdict is "ok", or where the value says it.
    """

    part: Part
    name: str
    verdict: Verdict
    value: str
    remedy: str = ""


class Limit(NamedTuple):
    """The shares from which a measurement is a warning, and a failure."""

    warning: float
    failure: float

    def verdict(self, share: float) -> Verdict:
        """Judge a share, 0 to 1; NaN, of nothing, is "ok"."""
        if share >= self.failure:
            return "failure"
        return "warning" if share >= self.warning else "ok"


# Of what, by the share that is wrong. Failures are of runs that would not start, or not learn.
LIMITS = {
    # rows
    "too long": Limit(_ANY, _ANY),
    "dropped": Limit(0.1, 1.0),
    "without reference": Limit(_ANY, 1.0),
    "cut references": Limit(0.05, 0.5),
    "references beyond samples": Limit(0.1, _NEVER),
    "refused by the template": Limit(_ANY, _ANY),
    "template": Limit(_ANY, _NEVER),
    # samples
    "cut samples": Limit(0.1, 0.9),
    "empty samples": Limit(0.1, 0.9),
    "equal samples": Limit(0.25, 0.9),
    # rewards
    "no reward": Limit(_ANY, 0.5),
    "dead groups": Limit(0.5, 0.9),
    "equal rewards of samples": Limit(0.5, _NEVER),
    "lost by the reference": Limit(0.5, 0.9),
    "lost by the reference, clipped": Limit(0.5, _NEVER),
    # step
    "reward's share of the time": Limit(0.5, _NEVER),
    "memory": Limit(0.9, 1.0),
}


def judged(
    part: Part, name: str, limit: str, share: float, value: str, remedy: str = ""
) -> Finding:
    """Return the finding on a share, judged by the limit of this name; "ok" needs no remedy."""
    verdict = LIMITS[limit].verdict(share)
    return Finding(part, name, verdict, value, "" if verdict == "ok" else remedy)


def percent(share: float) -> str:
    """Return a share as a percentage, which is 0% or 100% only if it is exactly that."""
    if math.isnan(share):
        return "-"
    return f"{min(max(100 * share, 1), 99) if 0 < share < 1 else 100 * share:.0f}%"


def share(part: int, whole: int) -> float:
    """Return part / whole; 0 of nothing."""
    return part / whole if whole else 0.0
