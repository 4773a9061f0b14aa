"""Which prompts a step takes: those of the stream, without the ones that a curriculum lets rest.

Where dead groups are refilled, a step takes more prompts than its batch, and the next step goes on
behind them. With a curriculum, a prompt whose group was dead is passed over for an epoch, after the
next dead group for two, then four, and for eight from then on; after a live group it is drawn as
before. Both depend on rewards alone, which all processes have, and are part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grao_fast.training.state import DataStream

_LONGEST_REST = 8  # epochs


class _Rest(NamedTuple):
    """Of a prompt: how many of its groups in turn were dead, and the epoch that it rests until."""

    times: int
    until: int


class PromptDraws:
    """The prompts that a run draws from its stream.

    What a step draws becomes part of the state when the step is done, so that a step which is
    interrupted can be repeated.
    """

    def __init__(self, stream: DataStream, *, curriculum: bool) -> None:
        self.stream, self.curriculum = stream, curriculum
        self._next = 0  # place in the stream
        self._drawn: dict[int, int] = {}  # in this step: the epoch of each prompt
        self._beyond = 0  # places that the steps done went beyond their batches
        self._rests: dict[int, _Rest] = {}
        self.passed_over = 0  # in this step
        self._sampled: Sequence[tuple[int, bool]] = ()

    def planned(self, step: int) -> list[int]:
        """Indices of a step's prompts where every step takes its batch and no prompt rests."""
        start = self._start(step)
        return self.stream.at(range(start, start + self.stream.batch_size))

    def batch(self, step: int) -> list[int]:
        """Indices of the prompts that a step begins with."""
        self._next, self._drawn = self._start(step), {}
        self.passed_over = 0
        return self.more(self.stream.batch_size)

    def more(self, count: int) -> list[int]:
        """Indices of the next prompts."""
        found: list[int] = []
        while len(found) < count:
            places = range(self._next, self._next + count - len(found))
            self._next = places.stop
            for place, index in zip(places, self.stream.at(places), strict=True):
                if self._rests_at(index, place):
                    self.passed_over += 1
                else:
                    found.append(index)
                    self._drawn[index] = place // self.stream.size
        return found

    def _start(self, step: int) -> int:
        return step * self.stream.batch_size + self._beyond

    def _rests_at(self, index: int, place: int) -> bool:
        return index in self._rests and place // self.stream.size < self._rests[index].until

    def tell(self, sampled: Sequence[tuple[int, bool]]) -> None:
        """Say of every prompt that the step has drawn whether its group was dead."""
        self._sampled = sampled

    def done(self, step: int) -> None:
        """Make what a step drew part of the state."""
        self._beyond = self._next - (step + 1) * self.stream.batch_size
        if not self.curriculum:
            return
        for index, dead in self._sampled:
            epoch = self._drawn[index]
            times = self._rests.pop(index, _Rest(0, 0)).times + 1
            if dead:
                rest = min(2 ** (times - 1), _LONGEST_REST)
                self._rests[index] = _Rest(times, epoch + 1 + rest)

    @property
    def resting(self) -> int:
        """How many prompts rest where the stream is."""
        return sum(self._next // self.stream.size < rest.until for rest in self._rests.values())

    def epochs(self, step: int) -> float:
        """Epochs that the first `step` steps, all done, have gone through."""
        return (step * self.stream.batch_size + self._beyond) / self.stream.size

    def state(self, step: int) -> dict[str, Any]:
        """What `load` takes, as data for JSON, after so many steps."""
        return {
            "beyond": self._beyond,
            "rests": {str(i): list(r) for i, r in self._rests.items()},
            "stream": self.stream.state(self._start(step)),
        }

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Take over the state of a checkpoint; None: of one without."""
        if state is None:
            return
        self._beyond = state["beyond"]
        self.stream.load(state.get("stream"))
        if self.curriculum:
            rests: Mapping[str, Sequence[int]] = state["rests"]
            self._rests = {int(index): _Rest(*rest) for index, rest in rests.items()}
