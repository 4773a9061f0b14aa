"""Noticing that another process has failed or died, also while this one waits for it.

A thread of each process writes a heartbeat into a store (`torch.distributed.TCPStore`, held by
rank 0), and looks there for the failure that ends the run. Rank 0's also looks for heartbeats that
have stopped. The process that records the failure raises it, and the others raise `PeerFailed`. A
process that does not get out of an exchange, as of NCCL with a dead peer, is ended by its thread.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple, NoReturn

import torch.distributed as dist

from grao_fast.distributed.world import PeerFailed, World
from grao_fast.system import interruption
from grao_fast.system.errors import one_line
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

_FAILURE = "failure"
_BEAT = 1.0  # seconds between heartbeats
_BEATS_MISSED = 5  # after which a process is suspected, once an exchange with it has failed
_GRACE = 10.0  # seconds in which a process may end by itself
_TO_CONNECT = timedelta(seconds=30)


class ProcessDied(RuntimeError):
    """A process of the run was killed, or its machine is gone."""


class _Record(NamedTuple):
    """The failure that ends a run: who recorded it, and its message."""

    rank: int
    message: str


@contextmanager
def watched(world: World, *, heartbeat_timeout: float) -> Iterator[None]:
    """A context that ends in every process if one of them fails in it or dies."""
    watch = _Watch(world, _open_store(world), heartbeat_timeout)
    watch.start()
    try:
        yield
        world.each(lambda: None, held=True)  # rank 0, which holds the store, must not leave first
    except BaseException as error:
        if world.is_shared(error):
            raise
        with interruption.held():
            watch.failed(error)
    finally:
        watch.stop()


def _open_store(world: World) -> dist.TCPStore:
    """A store of the run's own: the threads use it while the process group is in use."""
    host = os.environ.get("MASTER_ADDR", socket.gethostname())
    opened: list[dist.TCPStore] = []

    def serve() -> int:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_TO_CONNECT)
        opened.append(store)
        return store.port

    port = world.main(serve)
    if opened:
        return opened[0]
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_TO_CONNECT)


class _Watch:
    """The thread of one process, and what the store tells of the others."""

    def __init__(self, world: World, store: dist.TCPStore, heartbeat_timeout: float) -> None:
        self.world, self.store, self.heartbeat_timeout = world, store, heartbeat_timeout
        self._ended = threading.Event()
        self._count = 0
        self._last: dict[int, tuple[bytes, float]] = {}  # heartbeat of each rank, and since when

    def start(self) -> None:
        """Start the thread, once every process has a heartbeat."""
        self._beat()
        self.world.each(lambda: None)
        threading.Thread(target=self._run, daemon=True, name="grao-fast-watch").start()

    def stop(self) -> None:
        """Let the thread end by itself."""
        self._ended.set()

    def failed(self, error: BaseException) -> NoReturn:
        """Raise an error of this process, or the one that it follows from in another.

        An exchange with a process that has failed or died raises RuntimeError: then its record, or
        its silence, is waited for.
        """
        record = dead = None
        with suppress(RuntimeError):
            record = self._recorded()
        if record is None and isinstance(error, RuntimeError):
            record, dead = self._look_for_cause()
        if record is None:
            died = None if dead is None else ProcessDied(self._death(dead))
            mine = died or error
            record = self._record(f"{type(mine).__name__}: {one_line(mine)}")
            if record.rank == self.world.rank:
                if died is not None:
                    raise died from error
                if error.args and isinstance(error.args[0], str):
                    error.args = (f"{self._me()}: {error.args[0]}{_resume()}", *error.args[1:])
                raise error
        raise PeerFailed(*record) from error

    def _look_for_cause(self) -> tuple[_Record | None, int | None]:
        """The failure that another process records soon, or the rank of one that is silent."""
        try:
            before = self._beats()
            for _ in range(_BEATS_MISSED):
                time.sleep(_BEAT)
                if (record := self._recorded()) is not None:
                    return record, None
            after = self._beats()
        except RuntimeError:  # the store is gone, and with it rank 0
            return None, 0
        others = (rank for rank in range(self.world.size) if rank != self.world.rank)
        return None, next((rank for rank in others if before[rank] == after[rank]), None)

    def _run(self) -> None:
        while not self._ended.wait(_BEAT):
            try:
                self._beat()
                record = self._recorded()
                dead = self._dead() if record is None and self.world.is_main else None
            except RuntimeError:
                record, dead = None, 0
            if dead is not None and not self._ended.is_set():
                record = self._record(f"{ProcessDied.__name__}: {self._death(dead)}")
            if record is not None:
                self._end(record)
                return

    def _end(self, record: _Record) -> None:
        """End this process if it does not end by itself, as one that waits in NCCL does not."""
        if self._ended.wait(_GRACE):
            return
        if record.rank == self.world.rank:
            logger.error("%s", record.message)
        os._exit(1)

    def _beat(self) -> None:
        self._count += 1
        self.store.set(f"beat/{self.world.rank}", str(self._count))

    def _beats(self) -> list[bytes]:
        return self.store.multi_get([f"beat/{rank}" for rank in range(self.world.size)])

    def _dead(self) -> int | None:
        """The first rank without a heartbeat for the time that it is allowed."""
        now = time.monotonic()
        for rank, beat in enumerate(self._beats()):
            if self._last.get(rank, (b"", now))[0] != beat:
                self._last[rank] = beat, now
            elif now - self._last[rank][1] > self.heartbeat_timeout:
                return rank
        return None

    def _recorded(self) -> _Record | None:
        if not self.store.check([_FAILURE]):
            return None
        return _Record(*json.loads(self.store.get(_FAILURE)))

    def _record(self, message: str) -> _Record:
        """Record a failure unless there is one; returns the one that is recorded.

        Without the store, which dies with rank 0, rank 1 reports that.
        """
        mine = json.dumps([self.world.rank, message])
        try:
            return _Record(*json.loads(self.store.compare_set(_FAILURE, "", mine)))
        except RuntimeError:
            return _Record(1, message)

    def _death(self, rank: int) -> str:
        return (
            f"rank {rank} of {self.world.size} died without an error of its own, as a process does "
            f"that is killed or whose machine runs out of memory{_resume()}"
        )

    def _me(self) -> str:
        return f"rank {self.world.rank} of {self.world.size}"


def _resume() -> str:
    """Where the run can be resumed from, behind a message."""
    path = interruption.checkpoint()
    return f"; resume_from_checkpoint=True goes on from {path}" if path else ""
