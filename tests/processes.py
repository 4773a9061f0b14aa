"""Starts the processes of a run with the environment that torchrun sets, and watches them end.

They are forked, which takes a tenth of the time that importing torch and transformers would.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets  # noqa: F401, imported before the fork, as the next ones are
import torch.distributed.fsdp
import torch.distributed.tensor
from tqdm import tqdm

import grao_fast.trainer  # noqa: F401

_LOOK = 0.01  # seconds between two looks at processes that run


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    status: the exit code, or minus the number of the signal that killed it.
    seconds: from the start of all processes to the end of this one.
    """

    rank: int
    status: int
    seconds: float
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[str]:
        """What it printed on stderr, without progress bars."""
        return [line for line in self.stderr.splitlines() if line and "it/s]" not in line]


class Processes:
    """The running processes of `started`.

    began: when, by `time.monotonic`.
    """

    def __init__(self, pids: list[int], folder: Path) -> None:
        self.pids, self._folder = pids, folder
        self.began = time.monotonic()
        self._statuses: dict[int, tuple[int, float]] = {}

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def send(self, rank: int, signum: int = signal.SIGKILL) -> None:
        """Send a signal to a process unless it has ended."""
        if rank not in self.ended():
            os.kill(self.pids[rank], signum)

    def ended(self) -> set[int]:
        """The ranks that have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self._statuses:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self._statuses[rank] = os.waitstatus_to_exitcode(status), self.seconds
        return set(self._statuses)

    def wait(self, timeout: float = 60.0) -> list[Ended]:
        """Wait for the end of all; returns how each ended, by rank.

        Raises:
            TimeoutError: one still runs after `timeout` seconds; all are killed.
        """
        deadline = time.monotonic() + timeout
        while len(self.ended()) < len(self.pids):
            if time.monotonic() > deadline:
                late = sorted(set(range(len(self.pids))) - self.ended())
                self.kill()
                raise TimeoutError(f"ranks {late} ran for {timeout:g} s more: {self._all()}")
            time.sleep(_LOOK)
        return self._all()

    def wait_for_rank(self, rank: int, timeout: float) -> None:
        """Wait for the end of one process. Raises TimeoutError as `wait` does."""
        deadline = time.monotonic() + timeout
        while rank not in self.ended():
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"rank {rank} ran for {timeout:g} s more: {self._all()}")
            time.sleep(_LOOK)

    def sleep(self, seconds: float) -> None:
        """Wait until some seconds after the start."""
        time.sleep(max(0.0, seconds - self.seconds))

    def wait_for(self, path: Path, timeout: float = 60.0) -> None:
        """Wait until a file or folder exists. Raises TimeoutError, also if all have ended."""
        deadline = time.monotonic() + timeout
        while not path.exists():
            if time.monotonic() > deadline or len(self.ended()) == len(self.pids):
                self.kill()
                raise TimeoutError(f"there is no {path.name}: {self._all()}")
            time.sleep(_LOOK)

    def kill(self) -> None:
        """Kill those that run, suspended ones too, and wait for their end."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.ended():
                os.kill(pid, signal.SIGKILL)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                self._statuses[rank] = status, self.seconds

    def _all(self) -> list[Ended]:
        return [
            Ended(rank, *self._statuses[rank], *(_printed(self._folder, rank)))
            for rank in sorted(self._statuses)
        ]


@contextmanager
def started(body: Callable[[int], Any], folder: Path, *, size: int = 2) -> Iterator[Processes]:
    """Call `body(rank)` in each of `size` processes; those that run at the end are killed.

    An exception ends a process as it ends a Python program.

    Args:
        folder: an existing one, for what they print.
    """
    environment = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    pids = []
    for rank in range(size):
        pid = os.fork()
        if not pid:
            _be(rank, environment, body, folder)
        pids.append(pid)
    processes = Processes(pids, folder)
    try:
        yield processes
    finally:
        processes.kill()


def launch(
    body: Callable[[int], Any], folder: Path, *, size: int = 2, timeout: float = 60.0
) -> list[Ended]:
    """Call `body(rank)` in each of `size` processes, and return how each ended."""
    with started(body, folder, size=size) as processes:
        return processes.wait(timeout)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _be(rank: int, environment: dict[str, str], body: Callable[[int], Any], folder: Path) -> None:
    """Be the process of a rank, in a child that was just forked."""
    status = 1
    try:
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        _print_into(folder, rank)
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork, and are waited for
        # shared by all children, and locked for ever if one is killed that holds it
        tqdm.set_lock(threading.RLock())
        status = _status_of(lambda: body(rank))
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        if status == -signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(status)


def _status_of(body: Callable[[], Any]) -> int:
    """The status with which Python ends after a program, whose exception it prints."""
    try:
        body()
        return 0
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1


def _print_into(folder: Path, rank: int) -> None:
    """Send what this process prints to files, and log as a program that sets up nothing."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
        setattr(sys, name, open(descriptor, "w", buffering=1, closefd=False))  # noqa: SIM115
    logging.getLogger().handlers.clear()  # of pytest
    logging.getLogger().setLevel(logging.WARNING)


def _printed(folder: Path, rank: int) -> tuple[str, str]:
    stdout, stderr = (
        path.read_text(errors="replace") if path.exists() else ""
        for path in (folder / f"stdout-{rank}", folder / f"stderr-{rank}")
    )
    return stdout, stderr
