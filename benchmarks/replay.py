"""Turns interleaved measurements into rows of pytest-benchmark.

pytest-benchmark times one function to the end before the next. Contenders that take turns are
therefore timed in `measure.py`, and their rounds are then played back on a clock of its own, by
pytest-benchmark's option `timer`: a module says `pytestmark = pytest.mark.benchmark(timer=clock)`.
"""

from __future__ import annotations

from typing import Any

import pytest
from measure import Measured
from peers import Peer

PRESENT: set[str] = set()
ABSENT: dict[str, str] = {}  # label -> why, for the summary and the JSON

_now = 0.0


def clock() -> float:
    """Return the seconds that `report` has replayed so far."""
    return _now


def report(
    benchmark: Any,
    race: tuple[dict[str, Measured], dict[str, str]],
    key: str,
    peer: Peer,
    facts: dict[str, Any],
) -> None:
    """Replay one contender's rounds to pytest-benchmark, or skip it with the reason."""
    measured, absences = race
    if key in absences:
        skip(peer, absences[key])
    PRESENT.add(peer.label)
    durations = iter(measured[key].seconds)

    def play() -> None:
        global _now
        _now += next(durations)

    benchmark.pedantic(play, rounds=len(measured[key].seconds))
    benchmark.extra_info.update(names(peer) | facts | measured[key].summary())


def skip(peer: Peer, reason: str) -> None:
    ABSENT[peer.label] = reason
    pytest.skip(reason)


def names(peer: Peer) -> dict[str, str]:
    return {"variant": peer.name, "label": peer.label}
