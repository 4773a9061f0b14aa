"""Async functions at the same time in one event loop, which can be left though one hangs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from typing import Any

from grao_fast.system.threads import DaemonExecutor

_THREADS = 32  # of asyncio.to_thread: as many as Python allows at the most
_GOODBYE = 1.0  # seconds that what is cancelled gets to close its connections


class LoopStoppedError(RuntimeError):
    """A function stopped the loop that it ran in, before all had ended."""


class AsyncCalls:
    """Calls of async functions, by number, and their outcomes.

    `asyncio.run` waits for what it cancels and for the threads of `asyncio.to_thread`, for ever
    where these hang. `run` waits for the outcomes and no longer.
    """

    def __init__(self, calls: Mapping[int, Callable[[], Awaitable[Any]]]) -> None:
        self.outcomes: dict[int, Future[Any]] = {i: Future() for i in calls}
        self._calls = dict(calls)
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> None:
        """Await all in a loop of this thread, which must run none. Errors are in the outcomes."""
        loop = self._loop = asyncio.new_event_loop()
        threads = DaemonExecutor(_THREADS)
        loop.set_default_executor(threads)
        tasks = [loop.create_task(self._settle(i)) for i in self._calls]
        try:
            loop.run_until_complete(asyncio.wait(tasks))
        except RuntimeError as error:  # asyncio's own word for it
            for outcome in self.outcomes.values():
                if not outcome.done():
                    outcome.set_exception(LoopStoppedError(str(error)))
        finally:
            _leave(loop)
            threads.shutdown()

    async def _settle(self, i: int) -> None:
        outcome = self.outcomes[i]
        try:
            result = await self._calls[i]()
        except Exception as error:  # of any kind: whoever waits for the outcome raises it
            if not outcome.done():  # else the loop was stopped meanwhile
                outcome.set_exception(error)
        else:
            if not outcome.done():
                outcome.set_result(result)

    def abandon(self) -> None:
        """Cancel what still runs, from another thread; does not wait for it."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        try:
            loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
        except RuntimeError:  # it was closed this moment
            return


def _leave(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what is left, give it a moment, and close the loop."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left, timeout=_GOODBYE))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
