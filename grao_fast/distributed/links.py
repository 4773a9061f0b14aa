"""Connections of all processes to rank 0, by which they learn why a run ends.

They are separate from the process group, whose exchanges wait for processes that have failed. A
process that dies closes its connection, which rank 0 notices at once; one that is suspended, or
whose machine is gone, sends no more heartbeats.
"""

from __future__ import annotations

import hmac
import json
import os
import socket
import threading
import time
import weakref
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

from grao_fast.distributed.world import World
from grao_fast.system import interruption
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

_BEAT = 1.0  # seconds between heartbeats
_TO_CONNECT = 20.0  # seconds
_GRACE = 10.0  # seconds in which a process may end by itself
_BYE = b"bye"
_TOKEN = 16  # bytes
_KILLED = "died without an error of its own, as a process does that is killed for lack of memory"
_SILENT = "is suspended or cut off: no heartbeat"


class Ending(NamedTuple):
    """Why a run ends.

    rank: of the process that failed or died, or that a signal reached.
    told_by: the rank that shows the message; another one ends silently.
    died: whether the process ended without an error of its own.
    signum: of the signal; None for an error.
    """

    rank: int
    told_by: int
    message: str
    died: bool = False
    signum: int | None = None

    @property
    def status(self) -> int:
        """The exit status of a process that ends for this reason."""
        return 1 if self.signum is None else 128 + self.signum


class Links:
    """A context with the connections of one process: of rank 0 to all, of any other to rank 0.

    If a run ends, for the reason `ending`, and a process does not leave the context soon, as one
    that waits in NCCL or in a reward, it is ended by the thread of its links.

    Args:
        heartbeat_timeout: seconds without a heartbeat after which a process counts as dead.
        option: the user's name for it, in messages.
    """

    def __init__(
        self, world: World, *, heartbeat_timeout: float, option: str = "heartbeat_timeout"
    ) -> None:
        self._world, self._heartbeat_timeout, self._option = world, heartbeat_timeout, option
        self._settling, self._sending = threading.Lock(), threading.Lock()
        self._known, self._left = threading.Event(), threading.Event()
        self.ending: Ending | None = None

    def __enter__(self) -> Links:
        self._connections = _connect(self._world)
        _open.update(self._connections)
        threading.Thread(target=self._run, daemon=True, name="grao-fast-links").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._send(_BYE)

    def tell(self, ending: Ending) -> Ending:
        """Tell all processes why the run ends; returns the reason that was told first."""
        if not self._world.is_main:
            self._send(json.dumps(ending).encode())
            self.wait(self._heartbeat_timeout)
        return self._settle(ending)

    def wait(self, seconds: float) -> Ending | None:
        """The reason for which the run ends, if there is one within some seconds."""
        self._known.wait(seconds)
        return self.ending

    def _settle(self, ending: Ending) -> Ending:
        """Make this the reason unless there is one, which is returned. Rank 0 sends it to all."""
        with self._settling:
            if self.ending is None:
                self.ending = ending
                if self._world.is_main:
                    self._send(json.dumps(ending).encode())
                self._known.set()
            return self.ending

    def _run(self) -> None:
        now = looked = beat = time.monotonic()
        heard = dict.fromkeys(self._connections, looked)
        while self.ending is None and heard:
            if now >= beat:
                self._send(b"")
                beat = now + _BEAT
            ready = wait(list(heard), timeout=max(0.0, beat - time.monotonic()))
            if self._left.is_set():
                return
            now = time.monotonic()
            if now - looked > 5 * _BEAT:  # this process itself was suspended
                heard = dict.fromkeys(heard, now)
            looked = now
            for connection in ready:
                assert isinstance(connection, Connection)
                heard[connection] = now
                if not self._receive(connection):
                    del heard[connection]
            for connection, last in heard.items():
                if now - last > self._heartbeat_timeout:
                    silence = f"{_SILENT} ({self._option}) for {now - last:.0f} s"
                    self._settle(self._death(connection, silence))
        self._known.set()  # nothing more is to come
        if not self._left.wait(_GRACE) and self.ending is not None:
            if self.ending.told_by == self._world.rank:
                logger.error("%s", self.ending.message)
            os._exit(self.ending.status)

    def _receive(self, connection: Connection) -> bool:
        """Take a message of another process; returns whether more may come."""
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            self._settle(self._death(connection, _KILLED))
            return False
        if message not in (b"", _BYE):
            self._settle(Ending(*json.loads(message)))
        return message != _BYE

    def _death(self, connection: Connection, how: str) -> Ending:
        """The ending by the death of the process at the other end.

        Rank 0 tells of the others' deaths. Of its own tell rank 1 and, as that may have been on
        the same machine, the first process of every other machine.
        """
        world, rank = self._world, self._connections[connection]
        tells = world.is_main or world.rank == 1 or world.local_rank == 0
        message = f"rank {rank} of {world.size} {how}{resume()}"
        return Ending(rank, world.rank if tells else rank, message, died=True)

    def _send(self, message: bytes) -> None:
        with self._sending:
            for connection in self._connections:
                with suppress(OSError):  # it is gone, which _receive notices
                    connection.send_bytes(message)


def resume() -> str:
    """Where the run can be resumed from, behind a message; "" if nothing is saved."""
    path = interruption.checkpoint()
    return f"; resume_from_checkpoint=True goes on from {path}" if path else ""


def _connect(world: World) -> dict[Connection, int]:
    """The connections of this process, and the ranks at their other ends.

    Raises:
        UserError: rank 0 cannot be reached.
    """
    servers: list[socket.socket] = []

    def listen() -> tuple[str, int, bytes]:
        host = os.environ.get("MASTER_ADDR") or socket.gethostname()
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(
            ("", 0), family=family, backlog=world.size, dualstack_ipv6=both
        )
        servers.append(server)
        return host, server.getsockname()[1], os.urandom(_TOKEN)

    host, port, token = world.main(listen)

    def join() -> dict[Connection, int]:
        if world.is_main:
            with servers[0] as server:
                return _accept(server, token, world.size - 1)
        link = _over(socket.create_connection((host, port), timeout=_TO_CONNECT))
        link.send_bytes(token + str(world.rank).encode())
        return {link: 0}

    def joined() -> dict[Connection, int]:
        try:
            return join()
        except OSError as error:
            raise UserError(
                f"not all processes reach rank 0 at {host}:{port} ({error}): set MASTER_ADDR to a "
                "name of its machine that all have, and let them connect to its ports"
            ) from error

    return world.together(joined)


def _accept(server: socket.socket, token: bytes, number: int) -> dict[Connection, int]:
    """The connections of all others, and their ranks; whoever lacks the token is turned away."""
    server.settimeout(_TO_CONNECT)
    found: dict[Connection, int] = {}
    while len(found) < number:
        link = _over(server.accept()[0])
        with suppress(EOFError, OSError):
            greeting = link.recv_bytes(_TOKEN + 20) if link.poll(_TO_CONNECT) else b""
            if hmac.compare_digest(greeting[:_TOKEN], token):
                found[link] = int(greeting[_TOKEN:])
    return found


def _over(connected: socket.socket) -> Connection:
    """Messages over a socket."""
    connected.settimeout(None)
    return Connection(connected.detach())


# A child that a reward forks must not hold open the connection of a process that has died.
_open: weakref.WeakSet[Connection] = weakref.WeakSet()


def _close_in_child() -> None:
    for connection in list(_open):
        connection.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
