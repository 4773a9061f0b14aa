"""Runs async functions concurrently in one event loop that can be abandoned if one hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from typing import Any

from grao_fast.system.threads import DaemonExecutor

_THREADS = 32  # for asyncio.to_thread, Python's own maximum
_GRACE = 1.0  # seconds that cancelled tasks have to close their connections


class LoopStoppedError(RuntimeError):
    """An async function stopped its event loop before all functions had finished."""


class AsyncCalls:
    """Calls of async functions, by number, and their outcomes.

    Unlike `asyncio.run`, which also waits for cancelled tasks and for the threads of
    `asyncio.to_thread`, and so hangs if these do, `run` waits only for the outcomes.
    """

    def __init__(self, calls: Mapping[int, Callable[[], Awaitable[Any]]]) -> None:
        self.outcomes: dict[int, Future[Any]] = {i: Future() for i in calls}
        self._calls = dict(calls)
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> None:
        """Await all calls in a new loop; this thread must run none. Errors go to `outcomes`."""
        loop = self._loop = asyncio.new_event_loop()
        threads = DaemonExecutor(_THREADS)
        loop.set_default_executor(threads)
        tasks = [
            loop.create_task(_settle(call, self.outcomes[i])) for i, call in self._calls.items()
        ]
        try:
            loop.run_until_complete(asyncio.wait(tasks))
        except RuntimeError as error:  # raised by asyncio if the loop was stopped
            for outcome in self.outcomes.values():
                if not outcome.done():
                    outcome.set_exception(LoopStoppedError(str(error)))
        finally:
            _leave(loop)
            threads.shutdown()

    def abandon(self) -> None:
        """Cancel the calls that still run, from another thread, without waiting for them."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        try:
            loop.call_soon_threadsafe(_cancel_all, loop)
        except RuntimeError:  # the loop was closed meanwhile
            return


class OpenLoop:
    """An event loop in a thread, to which calls of async functions are added one by one."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._outcomes: list[Future[Any]] = []
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself holds them weakly
        self._ended = False
        self._lock = threading.Lock()  # of `_outcomes` and `_ended`

    def run(self) -> None:
        """Run the loop until it is abandoned; to be called in a thread of its own."""
        threads = DaemonExecutor(_THREADS)
        self._loop.set_default_executor(threads)
        try:
            self._loop.run_forever()
        finally:
            with self._lock:
                self._ended = True
                for outcome in self._outcomes:
                    if not outcome.done():
                        outcome.set_exception(LoopStoppedError())
            _leave(self._loop)
            threads.shutdown()

    def add(self, call: Callable[[], Awaitable[Any]]) -> Future[Any]:
        """Begin a call, from another thread; returns its outcome."""
        outcome: Future[Any] = Future()
        with self._lock:
            if self._ended:
                outcome.set_exception(LoopStoppedError())
            else:
                self._outcomes.append(outcome)
                self._loop.call_soon_threadsafe(self._start, call, outcome)
        return outcome

    def _start(self, call: Callable[[], Awaitable[Any]], outcome: Future[Any]) -> None:
        task = self._loop.create_task(_settle(call, outcome))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def abandon(self) -> None:
        """End the loop and cancel the calls that still run, from another thread."""
        with self._lock:
            if not self._ended:
                self._loop.call_soon_threadsafe(self._loop.stop)


async def _settle(call: Callable[[], Awaitable[Any]], outcome: Future[Any]) -> None:
    """Await a call, and give its result or error to `outcome` unless the loop was stopped."""
    try:
        result = await call()
    except Exception as error:  # of any kind: raised again by whoever waits for the outcome
        if not outcome.done():
            outcome.set_exception(error)
    else:
        if not outcome.done():
            outcome.set_result(result)


def _cancel_all(loop: asyncio.AbstractEventLoop) -> set[asyncio.Task[Any]]:
    """Cancel the tasks of a loop and return them."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    return tasks


def _leave(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel the remaining tasks, wait for them briefly, and close the loop."""
    remaining = _cancel_all(loop)
    if remaining:
        loop.run_until_complete(asyncio.wait(remaining, timeout=_GRACE))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
