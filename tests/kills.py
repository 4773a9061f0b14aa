"""Runs processes that are killed at a given change of a folder, or at a given moment."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def fork(body: Callable[[], Any]) -> int:
    """Run `body` in a child that exits after it, and return the child's id.

    A child that has not ended after five minutes is ended by SIGALRM, with a traceback.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.alarm(300)
    # tqdm's lock is a semaphore shared by all children: if one is killed while it holds the lock,
    # it stays locked for all others.
    tqdm.set_lock(threading.RLock())
    try:
        body()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def exit_status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at_change(number: int, folder: Path, body: Callable[[], Any]) -> bool:
    """Run `body` in a child that is killed before its change number `number` of a folder.

    A change is a file opened for writing, created, renamed, truncated, deleted or flushed.
    Returns False if the child ended before that many changes.
    """

    def run() -> None:
        _kill_at(number, str(folder.resolve()))
        body()

    status = exit_status(fork(run))
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def _kill_at(number: int, folder: str) -> None:
    left = [number]

    def change() -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in _CHANGES and not (event == "open" and args[2] & _WRITING):
            return
        if isinstance(args[0], int):  # an open file
            return
        # rmtree names files relative to an open folder: all of these count
        relative = event in ("os.remove", "os.rmdir") and args[-1] not in (-1, None)
        if relative or os.path.abspath(os.fsdecode(args[0])).startswith(folder):
            change()

    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        change()
        fsync(descriptor)

    os.fsync = counted_fsync
    sys.addaudithook(hook)
