"""Calls reward functions: concurrently, each with its own copy of the data, with a time limit."""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from grao_fast.rewards.copies import own_copy
from grao_fast.rewards.event_loop import AsyncCalls, LoopStoppedError
from grao_fast.rewards.finding import (
    RewardError,
    RewardFunction,
    function_name,
    running,
    select_arguments,
)
from grao_fast.rewards.generators import GlobalGenerators
from grao_fast.rewards.values import check_values
from grao_fast.system.interruption import check
from grao_fast.system.threads import in_thread
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

Results = dict[int, Any]


class _TooSlow(RewardError):
    """A call that took longer than its time limit."""


class Caller:
    """Calls functions on the same texts, each with deep copies of the arguments that it takes.

    A single function runs in the calling thread, unless there is a time limit. Several functions
    run concurrently: the async ones in one event loop, every other one in a thread of its own.

    Two kinds of functions cannot run in threads. Random numbers drawn from the global generators of
    Python, NumPy or torch would depend on the order of the threads, and a resumed run must draw the
    same ones; so if a call moves a generator, all generators are restored and the functions are
    called again one after another, then and from then on. Some functions work only in the main
    thread; so a function that fails in a thread is called again in the calling thread, and is
    called there from then on if that succeeds.

    timeouts: of each function, the most seconds that a call may take; None: no limit. A function
        with a limit runs in a thread, as only a thread can be abandoned.
    """

    def __init__(
        self, functions: Sequence[RewardFunction], *, timeouts: Sequence[float | None]
    ) -> None:
        self.functions, self.timeouts = list(functions), list(timeouts)
        self.names = [function_name(function) for function in functions]
        self._async = [i for i, function in enumerate(functions) if is_async(function)]
        self._sync = [i for i in range(len(functions)) if i not in self._async]
        # functions that run in the calling thread
        self._here = set(self._sync) if len(self._sync) == 1 else set()
        self._together = len(self._sync) + bool(self._async) > 1

    def call(self, offered: Mapping[str, Any], labels: Sequence[str]) -> list[list[float]]:
        """Return one list of floats for each function, with NaN for None.

        offered: the arguments that functions can take, by name; lists of one item for each text.
        labels: names of the texts for errors.

        Raises RewardError that names the first function that fails, and a wrong value and its text.
        """
        for function in self.functions:
            select_arguments(function, offered)
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # restored if a reward changes it
            results = self._at_once(offered) if self._together else self._in_turn(offered)
        check()  # a reward may have caught the exception of a signal, and returned no real scores
        return [check_values(name, results[i], labels) for i, name in enumerate(self.names)]

    def _in_turn(self, offered: Mapping[str, Any]) -> Results:
        results = {i: self._call_here(i, offered) for i in self._sync}
        if not self._async:
            return results
        loop = self._async_calls(offered)
        started = time.monotonic()
        if all(self.timeouts[i] is None for i in self._async) and not _in_a_loop():
            loop.run()
        else:
            in_thread(as_here(loop.run))
        try:
            return results | {i: self._wait(i, loop.outcomes[i], started) for i in self._async}
        finally:
            loop.abandon()

    def _at_once(self, offered: Mapping[str, Any]) -> Results:
        generators, started = GlobalGenerators.now(), time.monotonic()
        outcomes = {
            i: in_thread(as_here(partial(self._call, i, offered)))
            for i in self._sync
            if i not in self._here
        }
        loop = self._async_calls(offered)
        if self._async:
            in_thread(as_here(loop.run))
        results, errors = {}, {}
        try:
            for i in sorted(self._here):
                results[i] = self._call_here(i, offered)
            outcomes |= loop.outcomes
            for i in sorted(outcomes, key=self._limit):  # so that a limit is noticed when it ends
                try:
                    results[i] = self._wait(i, outcomes[i], started)
                except _TooSlow:
                    raise
                except RewardError as error:
                    errors[i] = error
        finally:
            loop.abandon()
        if any(i in self._async or self.timeouts[i] is not None for i in errors):
            raise errors[min(errors)]
        if generators.moved():
            generators.restore()
            return self._from_now_on_in_turn(offered)
        for i, error in errors.items():
            results[i] = self._call_here(i, offered)
            logger.warning(
                "%s; in the calling thread it succeeds, and is called there from now on", error
            )
            self._here.add(i)
        self._together = len(self._here) < len(self._sync) or bool(self._async)
        return results

    def _from_now_on_in_turn(self, offered: Mapping[str, Any]) -> Results:
        self._together = False
        logger.warning(
            "one of the rewards %s draws from a global random generator: from now on they run one "
            "after another, so that the run is reproducible. To run them concurrently, draw from a "
            "generator of its own, such as random.Random(0)",
            ", ".join(self.names),
        )
        return self._in_turn(offered)

    def _call_here(self, i: int, offered: Mapping[str, Any]) -> Any:
        if self.timeouts[i] is None:
            return self._call(i, offered)
        started = time.monotonic()
        return self._wait(i, in_thread(as_here(partial(self._call, i, offered))), started)

    def _call(self, i: int, offered: Mapping[str, Any]) -> Any:
        return call_function(self.functions[i], self.names[i], offered)

    def _async_calls(self, offered: Mapping[str, Any]) -> AsyncCalls:
        return AsyncCalls(
            {i: partial(call_async, self.functions[i], self.names[i], offered) for i in self._async}
        )

    def _limit(self, i: int) -> float:
        timeout = self.timeouts[i]
        return math.inf if timeout is None else timeout

    def _wait(self, i: int, outcome: Future[Any], started: float) -> Any:
        limit = self._limit(i)
        left = None if limit == math.inf else max(0.0, limit - time.monotonic() + started)
        try:
            return outcome.result(left)
        except LoopStoppedError as error:
            raise stopped(self.names[i], error) from None
        except futures.TimeoutError:
            raise too_slow(self.names[i], limit) from None


def stopped(name: str, error: LoopStoppedError) -> RewardError:
    """The error of an async function whose event loop was stopped."""
    return RewardError(
        f"reward {name} did not finish, because an async reward stopped the event loop"
        + (f": {error}" if str(error) else "")
    )


def too_slow(name: str, timeout: float) -> RewardError:
    """The error of a function that took longer than its time limit."""
    return _TooSlow(
        f"reward {name} took longer than reward_timeout={timeout:g} seconds: "
        "raise it, or set a time limit on what the reward waits for"
    )


def call_function(function: RewardFunction, name: str, offered: Mapping[str, Any]) -> Any:
    """Call a plain function with copies of the arguments that it takes. Raises RewardError."""
    arguments = _own_arguments(function, offered)
    with running(f"reward {name}"):
        result = function(**arguments)
    if not inspect.isawaitable(result):
        return result
    # a plain function that returned a coroutine
    loop = AsyncCalls({0: lambda: _awaited(name, result)})
    if _in_a_loop():
        in_thread(as_here(loop.run)).result()
    else:
        loop.run()
    try:
        return loop.outcomes[0].result()
    except LoopStoppedError as error:
        raise stopped(name, error) from None


async def call_async(function: RewardFunction, name: str, offered: Mapping[str, Any]) -> Any:
    """Call an async function with copies of the arguments that it takes. Raises RewardError."""
    return await _awaited(name, function(**_own_arguments(function, offered)))


async def _awaited(name: str, result: Any) -> Any:
    with running(f"reward {name}"):
        return await result


def _own_arguments(function: RewardFunction, offered: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a function takes, copied for every text, even for texts of one prompt."""
    return {
        name: [own_copy(value) for value in values]
        for name, values in select_arguments(function, offered).items()
    }


def is_async(function: RewardFunction) -> bool:
    call = getattr(type(function), "__call__", None)  # noqa: B004, its kind matters
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _in_a_loop() -> bool:
    """Whether an event loop runs in this thread, as in a notebook, so that no other one can."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def as_here(function: Callable[[], Any]) -> Callable[[], Any]:
    """Return `function` for another thread, with this thread's grad mode and CUDA device."""
    grad = torch.is_grad_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def there() -> Any:
        if device is not None:
            torch.cuda.set_device(device)
        with torch.set_grad_enabled(grad):
            return function()

    return there
