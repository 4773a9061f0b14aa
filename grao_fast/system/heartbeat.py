"""A file's heartbeat: a number that a thread of its holder counts up shows that the holder lives.

Another machine cannot look the process up, but it can watch the file: a holder that is silent for
several beats is dead. A process that is suspended (SIGSTOP) is silent too; when it goes on and
finds its file taken over, it says so.
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

BEAT = 15.0  # seconds from one sign of life to the next
SILENCE = 60.0  # seconds without one after which a holder is dead
LOOK = 1.0  # seconds from one look for such a sign to the next
_LENGTH = 512  # of the file: a beat overwrites it whole, so that it is never shorter meanwhile


def beat(path: Path, mine: dict[str, Any], released: threading.Lock) -> None:
    """Write into the lock file that its holder lives, until `released` can be acquired.

    By a descriptor of its own, that it has read its holder's name from: whatever happens meanwhile
    (the file is deleted, made anew, taken over), it writes into no other file.
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
    """Whether a lock file changes, or goes, while it is watched.

    It is opened anew for each look, as NFS asks a server for what other machines have written. Only
    the file is compared, never the clocks of two machines.
    """
    logger.warning(
        "%s: cannot see from here whether process %s on %s lives: waiting up to %g s for a sign",
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
    """Who has written the file that is there now; empty where there is none."""
    with suppress(FileNotFoundError):
        return holder_in(path.read_bytes())
    return {}


def holder_in(content: bytes) -> dict[str, Any]:
    """Who has written a lock file; empty where nobody has to the end."""
    with suppress(ValueError):
        holder = json.loads(content)
        if isinstance(holder, dict):
            holder.pop("beat", None)
            return holder
    return {}


def content(holder: dict[str, Any], count: int) -> bytes:
    """What a file holds whose holder has beaten `count` times."""
    return json.dumps(holder | {"beat": count}).ljust(_LENGTH).encode()
