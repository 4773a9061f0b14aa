"""Keeps a counter in a lock file, by which other machines can tell that its holder is alive.

A thread of the holder increments the counter. A process on another machine cannot look up the
holder, but can watch the file: a holder that is silent for several beats is taken for dead. So is a
process that is suspended (SIGSTOP); if its file was taken over, it logs that when it continues.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

BEAT = 15.0  # seconds between two beats
SILENCE = 60.0  # seconds without a beat after which a holder is taken for dead
LOOK = 1.0  # seconds between two looks at the file
_LENGTH = 512  # bytes of the file, constant so that a beat overwrites it whole


def beat(path: Path, mine: dict[str, Any], released: threading.Lock) -> None:
    """Write beats into a lock file until `released` can be acquired.

    Every beat opens the file and reads the holder's name through the same descriptor, so that it
    never writes into a file of another holder, even if the lock file is deleted, created again or
    taken over meanwhile.
    """
    failed = False
    for count in itertools.count(1):
        if released.acquire(timeout=BEAT):
            return
        try:
            with path.open("r+b", buffering=0) as file:
                holder = holder_in(file.read())
                if holder == mine:
                    os.pwrite(file.fileno(), content(mine, count), 0)
                    os.fsync(file.fileno())
                    continue
            lost = f"taken over by process {holder.get('pid')} on {holder.get('host')}"
        except FileNotFoundError:
            lost = "deleted"
        except OSError as error:
            if not failed:
                logger.warning(
                    "%s (%s): a run on another machine may take this one for dead",
                    path, error.strerror,
                )  # fmt: skip
            failed = True
            continue
        if not released.acquire(blocking=False):
            logger.warning("%s was %s: two runs may write to this folder", path, lost)
        return


def beats(path: Path, holder: dict[str, Any]) -> bool:
    """Watch a lock file, and return whether it changes or disappears within SILENCE seconds.

    The file is opened again for every look, since NFS fetches other machines' writes on opening.
    Only contents are compared, never the clocks of two machines.
    """
    logger.warning(
        "%s: cannot tell from this machine whether process %s on %s is alive: waiting up to %g s "
        "for a heartbeat",
        path, holder.get("pid"), holder.get("host"), SILENCE,
    )  # fmt: skip
    deadline = time.monotonic() + SILENCE
    with suppress(FileNotFoundError):
        before = path.read_bytes()
        while time.monotonic() < deadline:
            time.sleep(LOOK)
            if path.read_bytes() != before:
                return True
        return False
    return True


def holder_at(path: Path) -> dict[str, Any]:
    """Return the holder that the lock file at `path` names; empty if there is no file."""
    with suppress(FileNotFoundError):
        return holder_in(path.read_bytes())
    return {}


def holder_in(content: bytes) -> dict[str, Any]:
    """Return the holder that the content of a lock file names; empty if it is incomplete."""
    with suppress(ValueError):
        holder = json.loads(content)
        if isinstance(holder, dict):
            holder.pop("beat", None)
            return holder
    return {}


def content(holder: dict[str, Any], count: int) -> bytes:
    """The content of the lock file of a holder after `count` beats."""
    return json.dumps(holder | {"beat": count}).ljust(_LENGTH).encode()
