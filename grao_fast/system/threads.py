"""Runs functions in daemon threads, which Python does not wait for at exit.

`concurrent.futures` joins its threads when Python exits, so that a function that hangs in one would
keep a run from ending that has failed or was told to stop.
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

    Functions run with the context variables of the caller of `submit`.
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
            except BaseException as error:  # of any kind: raised again by Future.result
                future.set_exception(error)
            else:
                future.set_result(result)

        self._waiting.put(work)
        if self._started < self._limit:
            self._started += 1
            threading.Thread(target=_work_off, args=(self._waiting,), daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads when they have run what was submitted; return at once."""
        for _ in range(self._started):
            self._waiting.put(None)


def in_thread(function: Callable[[], T]) -> Future[T]:
    """Call a function in a new daemon thread, and return its future."""
    executor = DaemonExecutor(1)
    outcome = executor.submit(function)
    executor.shutdown()
    return outcome


def _work_off(waiting: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (work := waiting.get()) is not None:
        work()
