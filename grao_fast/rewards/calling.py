"""Calling reward functions: at the same time, on copies of their own, and not for ever."""

from __future__ import annotations

import asyncio
import inspect
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


class Caller:
    """Calls functions on the same rows, each with deep copies of the arguments that it takes.

    A single function runs in the calling thread, unless there is a time limit. Of several, the
    async ones run in one event loop, every other in a thread, all at the same time. Threads share
    the global generators of Python, NumPy and torch: where one has moved meanwhile, all are put
    back, and the functions run again one after another, and so from then on, as a run that resumes
    must draw what it would have drawn. A function that fails in a thread is called once more in the
    calling one, and stays there where that helps: some work in the main thread only.

    timeout: seconds that a call may take; None: as many as it likes. Every call is then in a
        thread, as nothing else can be left while it runs.
    """

    def __init__(self, functions: Sequence[RewardFunction], *, timeout: float | None) -> None:
        self.functions, self.timeout = list(functions), timeout
        self.names = [function_name(function) for function in functions]
        self._async = [i for i, function in enumerate(functions) if _is_async(function)]
        self._sync = [i for i in range(len(functions)) if i not in self._async]
        # in the calling thread
        self._here = set(self._sync) if len(self._sync) == 1 else set()
        self._together = len(self._sync) + bool(self._async) > 1

    def call(self, offered: Mapping[str, Any], labels: Sequence[str]) -> list[list[float]]:
        """One list of floats a function, NaN where it returned None.

        Raises RewardError naming the function, the first where several fail, and, where one value
        is wrong, that value and its row as `labels` calls it.
        """
        for function in self.functions:
            select_arguments(function, offered)
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # whatever a reward sets it to
            results = self._at_once(offered) if self._together else self._in_turn(offered)
        check()  # a reward that caught a signal's exception has not scored
        return [check_values(name, results[i], labels) for i, name in enumerate(self.names)]

    def _in_turn(self, offered: Mapping[str, Any]) -> Results:
        results = {i: self._call_here(i, offered) for i in self._sync}
        if not self._async:
            return results
        loop = self._async_calls(offered)
        started = time.monotonic()
        if self.timeout is None and not _in_a_loop():
            loop.run()
        else:
            in_thread(_as_here(loop.run))
        try:
            return results | {i: self._wait(i, loop.outcomes[i], started) for i in self._async}
        finally:
            loop.abandon()

    def _at_once(self, offered: Mapping[str, Any]) -> Results:
        generators, started = GlobalGenerators.now(), time.monotonic()
        outcomes = {
            i: in_thread(_as_here(partial(self._call, i, offered)))
            for i in self._sync
            if i not in self._here
        }
        loop = self._async_calls(offered)
        if self._async:
            in_thread(_as_here(loop.run))
        results, errors = {}, {}
        try:
            for i in sorted(self._here):
                results[i] = self._call_here(i, offered)
            for i, outcome in sorted((outcomes | loop.outcomes).items()):
                try:
                    results[i] = self._wait(i, outcome, started)
                except RewardError as error:
                    errors[i] = error
        finally:
            loop.abandon()
        if any(i in self._async or self.timeout is not None for i in errors):
            raise errors[min(errors)]
        if generators.moved():
            generators.restore()
            return self._from_now_on_in_turn(offered)
        for i, error in errors.items():
            results[i] = self._call_here(i, offered)
            logger.warning("%s; in the calling thread it does not, and stays there", error)
            self._here.add(i)
        self._together = len(self._here) < len(self._sync) or bool(self._async)
        return results

    def _from_now_on_in_turn(self, offered: Mapping[str, Any]) -> Results:
        self._together = False
        logger.warning(
            "one of the rewards %s draws from a global generator while others run: from now on "
            "they run one after another, so that the run can be repeated. With a generator of its "
            "own, such as random.Random(0), they could run at the same time",
            ", ".join(self.names),
        )
        return self._in_turn(offered)

    def _call_here(self, i: int, offered: Mapping[str, Any]) -> Any:
        if self.timeout is None:
            return self._call(i, offered)
        started = time.monotonic()
        return self._wait(i, in_thread(_as_here(partial(self._call, i, offered))), started)

    def _call(self, i: int, offered: Mapping[str, Any]) -> Any:
        function = self.functions[i]
        arguments = _own_arguments(function, offered)
        with running(f"reward {self.names[i]}"):
            result = function(**arguments)
        if not inspect.isawaitable(result):
            return result
        # not known to be async before it was called
        loop = AsyncCalls({i: lambda: self._await(i, result)})
        if _in_a_loop():
            in_thread(_as_here(loop.run))
        else:
            loop.run()
        return self._wait(i, loop.outcomes[i], time.monotonic())

    def _async_calls(self, offered: Mapping[str, Any]) -> AsyncCalls:
        return AsyncCalls({i: partial(self._call_async, i, offered) for i in self._async})

    async def _call_async(self, i: int, offered: Mapping[str, Any]) -> Any:
        function = self.functions[i]
        return await self._await(i, function(**_own_arguments(function, offered)))

    async def _await(self, i: int, result: Any) -> Any:
        with running(f"reward {self.names[i]}"):
            return await result

    def _wait(self, i: int, outcome: Future[Any], started: float) -> Any:
        left = None if self.timeout is None else max(0.0, self.timeout - time.monotonic() + started)
        try:
            return outcome.result(left)
        except LoopStoppedError as error:
            raise RewardError(
                f"reward {self.names[i]} did not end, as an async reward stopped the event loop: "
                f"{error}"
            ) from None
        except futures.TimeoutError:
            raise RewardError(
                f"reward {self.names[i]} took longer than reward_timeout={self.timeout:g} seconds: "
                "raise it, or give a time limit to what the reward waits for"
            ) from None


def _own_arguments(function: RewardFunction, offered: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a function takes; every row its own, though rows of a prompt are alike."""
    return {
        name: [own_copy(value) for value in values]
        for name, values in select_arguments(function, offered).items()
    }


def _is_async(function: RewardFunction) -> bool:
    call = getattr(type(function), "__call__", None)  # noqa: B004, it is to be looked at
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _in_a_loop() -> bool:
    """Whether an event loop runs in this thread, as in a notebook: another cannot."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _as_here(function: Callable[[], Any]) -> Callable[[], Any]:
    """`function` for another thread, with what torch keeps for each: grad mode and CUDA device."""
    grad = torch.is_grad_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def there() -> Any:
        if device is not None:
            torch.cuda.set_device(device)
        with torch.set_grad_enabled(grad):
            return function()

    return there
