"""Scores groups while others are still sampled, by functions that are marked for it.

`per_group` marks a reward function as one whose score of a completion depends on its own group
alone. During a rollout it is then called for each group as soon as the group is whole, with the
completions of one prompt and its reference, and not once for all. Nothing else tells whether a
function may be called so: one that normalises over a batch, or that a graphics card runs best on
all rows, may not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from grao_fast.rewards.calling import (
    as_here,
    call_async,
    call_function,
    is_async,
    stopped,
    too_slow,
)
from grao_fast.rewards.event_loop import LoopStoppedError, OpenLoop
from grao_fast.rewards.finding import RewardFunction
from grao_fast.rewards.generators import GlobalGenerators
from grao_fast.rewards.texts import GroupTexts
from grao_fast.rewards.values import check_values
from grao_fast.system.interruption import check
from grao_fast.system.threads import DaemonExecutor, in_thread
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

_SOON = 0.01  # seconds, the least time between two looks at calls with a time limit


def per_group(function: F) -> F:
    """Mark a reward function that may be called for each group by itself, and return it.

    A class whose instances are rewards sets `per_group = True` instead.

    Calls of a plain function follow one another in a thread of its own; those of an async function
    run concurrently in one event loop. A call must depend on its arguments alone: the order in
    which groups come is not that of the dataset, and changes from run to run.
    """
    function.per_group = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def is_per_group(function: RewardFunction) -> bool:
    """Whether a function, or that of a functools.partial, is marked by `per_group`."""
    return any(
        getattr(each, "per_group", False) is True
        for each in (function, getattr(function, "func", None))
    )


@dataclass(frozen=True)
class EarlyFunction:
    """A function that is marked by `per_group`.

    timeout: the most seconds that a call may take; None: no limit.
    """

    name: str
    call: RewardFunction
    timeout: float | None


@dataclass
class _Call:
    """A call of a function for a group; started and ended: by time.perf_counter."""

    number: int
    place: int
    function: EarlyFunction
    what: str
    outcome: Future[list[float]]
    started: float | None = None
    ended: float | None = None


class EarlyCalls:
    """Calls of `per_group` functions, which `begin` begins for a group, and their scores.

    Args:
        functions: by number.
        texts: texts(place, completions) returns what a group is scored by; None: it is not scored.
        alone: whether nothing else that draws random numbers runs meanwhile, so that a function
            which does is found out.
    """

    def __init__(
        self,
        functions: Mapping[int, EarlyFunction],
        texts: Callable[[int, Sequence[str]], GroupTexts | None],
        *,
        alone: bool,
    ) -> None:
        self._functions, self._texts = functions, texts
        self._grad = torch.is_grad_enabled()  # samplers turn it off
        self._alone, self._generators = alone, None
        self._calls: list[_Call] = []
        self._threads = {i: DaemonExecutor(1) for i, f in functions.items() if not is_async(f.call)}
        self._loop: OpenLoop | None = None
        self.begun: set[int] = set()
        self.overlapped = 0.0

    def begin(self, place: int, completions: Sequence[str]) -> None:
        """Begin to score the group of the prompt at a place; returns at once.

        Raises RewardError if a call has failed meanwhile.
        """
        self._raise_failed()
        self.begun.add(place)
        texts = self._texts(place, completions)
        if texts is None:
            return
        if self._alone and self._generators is None:
            self._generators = GlobalGenerators.now()
        with torch.set_grad_enabled(self._grad):
            for i in self._functions:
                self._submit(i, place, texts)

    def _submit(self, i: int, place: int, texts: GroupTexts) -> None:
        function = self._functions[i]
        what = f"{function.name}, called for {texts.name},"
        call = _Call(i, place, function, what, Future())
        self._calls.append(call)
        if i in self._threads:
            call.outcome = self._threads[i].submit(as_here(partial(_run, call, texts)))
            return
        if self._loop is None:
            self._loop = OpenLoop()
            in_thread(as_here(self._loop.run))
        call.outcome = self._loop.add(partial(_run_async, call, texts))

    def scores(self, places: Sequence[int]) -> dict[int, list[float]] | None:
        """Wait for all calls; returns each function's scores of all texts, in order of places.

        None: a function has drawn from a global random generator, and all generators are again as
        they were before the first call.

        Raises RewardError for the first call that fails, or that takes too long.
        """
        self.overlapped = self._busy(until=time.perf_counter())
        try:
            while running := [call for call in self._calls if not call.outcome.done()]:
                self._raise_failed()
                futures.wait(
                    [call.outcome for call in running],
                    timeout=_until_limit(running),
                    return_when=futures.FIRST_EXCEPTION,
                )
            self._raise_failed()
        finally:
            self.abandon()
        check()
        if self._generators is not None and self._generators.moved():
            self._generators.restore()
            logger.warning(
                "one of the rewards %s draws from a global random generator: from now on it is "
                "called after sampling, so that the run is reproducible. To score while others are "
                "sampled, a reward must depend on its arguments alone",
                ", ".join(function.name for function in self._functions.values()),
            )
            return None
        found = {(call.number, call.place): call.outcome.result() for call in self._calls}
        return {
            i: [score for place in places for score in found.get((i, place), [])]
            for i in self._functions
        }

    def abandon(self) -> None:
        """Begin nothing more, and wait for nothing."""
        for call in self._calls:
            call.outcome.cancel()
        for thread in self._threads.values():
            thread.shutdown()
        if self._loop is not None:
            self._loop.abandon()

    def _raise_failed(self) -> None:
        now = time.perf_counter()
        for call in self._calls:
            limit, started = call.function.timeout, call.started
            if limit is not None and started is not None and (call.ended or now) - started >= limit:
                raise too_slow(call.what, limit)
            if not call.outcome.done():
                continue
            try:
                call.outcome.result()
            except LoopStoppedError as error:
                raise stopped(call.what, error) from None

    def _busy(self, until: float) -> float:
        """Seconds before `until` in which a call ran."""
        spans = sorted(
            (call.started, min(call.ended or until, until))
            for call in self._calls
            if call.started is not None
        )
        total, reached = 0.0, 0.0
        for started, ended in spans:
            total += max(0.0, ended - max(started, reached))
            reached = max(reached, ended)
        return total


def _run(call: _Call, texts: GroupTexts) -> list[float]:
    call.started = time.perf_counter()
    try:
        values = call_function(call.function.call, call.what, texts.offered)
        return check_values(call.function.name, values, texts.labels)
    finally:
        call.ended = time.perf_counter()


async def _run_async(call: _Call, texts: GroupTexts) -> list[float]:
    call.started = time.perf_counter()
    try:
        values = await call_async(call.function.call, call.what, texts.offered)
        return check_values(call.function.name, values, texts.labels)
    finally:
        call.ended = time.perf_counter()


def _until_limit(running: Sequence[_Call]) -> float | None:
    """Seconds until the next of these calls may take too long; None without time limits."""
    now = time.perf_counter()
    left = [
        call.function.timeout - (0.0 if call.started is None else now - call.started)
        for call in running
        if call.function.timeout is not None
    ]
    return max(_SOON, min(left)) if left else None
