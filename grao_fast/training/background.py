"""Writing in a thread, while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from grao_fast.distributed.world import PeerFailed, World


class Background:
    """A thread in each process, which together do one thing at a time.

    name: of what is being done, until `finish`; None if nothing is.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._of_threads: World | None = None
        self._done: Future[None] = Future()
        self.name: int | None = None

    def start(self, name: int, work: Callable[[World], None]) -> None:
        """Call work(world) in a thread; every process must call it.

        work: exchanges by the world that it gets, which is the threads' own.
        """
        assert self.name is None, "one thing at a time"
        world = self._of_threads = self._of_threads or self._world.twin()
        done = self._done = Future()
        self.name = name

        def run() -> None:
            try:
                work(world)
                done.set_result(None)
            except BaseException as error:  # of any kind: `finish` raises it
                done.set_exception(error)

        # a daemon, as it may wait for a process that is gone
        threading.Thread(target=run, daemon=True, name="grao-fast-save").start()

    def finish(self) -> None:
        """Wait for the threads of all processes; raise in all what was raised in one."""
        self.name = None

        def result() -> None:
            try:
                self._done.result()
            except PeerFailed:  # the process that it names raises the error itself
                return

        self._world.each(result, held=True)
