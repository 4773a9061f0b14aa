"""Threads that a process which ends does not wait for.

`concurrent.futures` joins its threads when Python exits: a function that hangs in one of them would
keep a run that has failed, or was told to stop, from ending.
"""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class DaemonExecutor(ThreadPoolExecutor):
    """A ThreadPoolExecutor of daemon threads, which neither `with` nor Python's exit waits for.

    Work sees the context variables of whoever submits it.
    """

    def __init__(self, max_workers: int) -> None:
        super().__init__(max_workers)
        self._limit = max_workers
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._started = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `Executor.submit`."""
        future: Future[Any] = Future()
        context = contextvars.copy_context()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = context.run(fn, *args, **kwargs)
            except BaseException as error:  # of any kind: whoever waits for the result raises it
                future.set_exception(error)
            else:
                future.set_result(result)

        self._waiting.put(work)
        if self._started < self._limit:
            self._started += 1
            threading.Thread(target=_work_off, args=(self._waiting,), daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads when they have worked off what was submitted; returns at once."""
        for _ in range(self._started):
            self._waiting.put(None)


def in_thread(function: Callable[[], T]) -> Future[T]:
    """The outcome of a call in a daemon thread of its own."""
    executor = DaemonExecutor(1)
    outcome = executor.submit(function)
    executor.shutdown()
    return outcome


def _work_off(waiting: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (work := waiting.get()) is not None:
        work()
