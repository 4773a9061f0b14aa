"""Locks a folder for one run at a time, with a lock file that names its holder.

The operating system's lock (flock) on the file decides. It ends with its process, however that
dies, also across containers, and is not confused by process ids that are used again. The file also
names the process and its machine, for error messages, and for filesystems whose locks do not work
between machines. A holder on another machine is taken for dead when its heartbeat in the file has
stopped; the lock is then taken over, with a warning.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from grao_fast.system.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from grao_fast.system import heartbeat
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

LOCK_FILE = ".grao-fast-lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_PATIENCE = 1.0  # seconds to wait for a process that has just locked the file to write its name

_held: set[int] = set()  # descriptors, closed in forked children, which would keep the lock


def _let_go_in_child() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def only_run_in(folder: Path, *, watch: bool = True) -> Iterator[None]:
    """Hold the lock of an existing folder.

    Args:
        watch: watch the heartbeat of a holder on another machine, for up to a minute, to tell
            whether it is alive; False: assume that it is.

    Raises:
        ValueError: another run holds the lock.
        OSError: the lock file cannot be written.
    """
    path = folder.absolute() / LOCK_FILE  # the run may change its working directory
    descriptor, mine = _take(path, watch)
    _held.add(descriptor)
    released = threading.Lock()
    released.acquire()
    try:
        heart = threading.Thread(target=heartbeat.beat, args=(path, mine, released), daemon=True)
        heart.start()
        yield
    finally:
        if mine["pid"] == os.getpid():  # not in a child that was forked meanwhile
            # The thread is not joined, since Python's exit and garbage collector may run this.
            released.release()
            # Delete the file while it is locked: afterwards it may belong to another run.
            if heartbeat.holder_at(path) == mine:
                path.unlink(missing_ok=True)
            _held.remove(descriptor)
            os.close(descriptor)


def _take(path: Path, watch: bool) -> tuple[int, dict[str, Any]]:
    """Lock the file, write this process into it, and return its descriptor and that entry."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            works = _lock(descriptor, path)
            if works and not _is_still_at(descriptor, path):
                os.close(descriptor)  # deleted by its last holder: others would lock a new file
                continue
            holder = _read(descriptor)
            lives = _lives(holder, flock_works=works) if holder else False
            unseen = lives is None
            if unseen and watch:
                lives = heartbeat.beats(path, holder)
                if not _is_still_at(descriptor, path):
                    os.close(descriptor)  # released meanwhile
                    continue
            if lives is not False:
                raise UserError(
                    _in_use(path, heartbeat.holder_at(path) or holder, seen=bool(lives))
                )
            if holder:
                logger.warning(
                    "%s: taken over from process %s on %s, which is %s",
                    path, holder.get("pid"), holder.get("host"),
                    f"dead: no heartbeat for {heartbeat.SILENCE:g} s" if unseen else "gone",
                )  # fmt: skip
            mine = _me()
            _write(descriptor, path, mine)
            if unseen:
                # another machine that watched as well may have written at the same moment
                time.sleep(heartbeat.LOOK)
                if (other := heartbeat.holder_at(path)) != mine:
                    raise UserError(_in_use(path, other, seen=True))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor, mine


def _lock(descriptor: int, path: Path) -> bool:
    """Lock a file, and return True; False if the filesystem has no locks."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "this system has no flock")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        deadline = time.monotonic() + _PATIENCE
        while not (holder := _read(descriptor)) and time.monotonic() < deadline:
            time.sleep(0.01)
        raise UserError(_in_use(path, holder, seen=False)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "%s cannot be locked (%s): runs that start at the same moment may share the folder",
            path, error.strerror,
        )  # fmt: skip
        return False
    return True


def _is_still_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> dict[str, Any]:
    return heartbeat.holder_in(os.pread(descriptor, 4096, 0))


def _write(descriptor: int, path: Path, mine: dict[str, Any]) -> None:
    try:
        length = os.pwrite(descriptor, heartbeat.content(mine, 0), 0)
        os.ftruncate(descriptor, length)
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(f"cannot write {str(path)!r}: {error.strerror}") from error


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "boot": _boot(),
        "pid_namespace": _pid_namespace(),
        "started": _start_of(os.getpid()),
    }


def _lives(holder: dict[str, Any], *, flock_works: bool) -> bool | None:
    """Whether the process that wrote an unlocked lock file still runs; None if that is unknown.

    It is unknown on another machine, and, on a filesystem without locks, in another container.
    """
    me = _me()
    same_host, same_boot = (me[key] == holder.get(key) for key in ("host", "boot"))
    if not same_host and (not same_boot or me["boot"] is None):
        return None
    if not same_boot:
        return False  # this machine has been rebooted since
    if flock_works:
        return False
    if me["pid_namespace"] != holder.get("pid_namespace"):
        return None
    return _start_of(holder.get("pid")) == holder.get("started") is not None


def _boot() -> str | None:
    """The id of the machine's current boot; None if the system has none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def _pid_namespace() -> str | None:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return None


def _start_of(pid: Any) -> str | None:
    """The start time of a process, in clock ticks since boot; None if there is no such process."""
    with suppress(OSError):
        # the process name, in parentheses, may contain spaces and parentheses
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def _in_use(path: Path, holder: dict[str, Any], *, seen: bool) -> str:
    """The message of the error for a locked folder; seen: whether the holder is known to live."""
    if not holder:
        return f"output_dir {str(path.parent)!r} is in use by another run: choose another folder"
    host = socket.gethostname()
    who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
    if (holder.get("host"), holder.get("pid")) == (host, os.getpid()):
        who = f"another run of this process ({os.getpid()})"
    remedy = "wait for it, stop it, or choose another folder"
    if not seen and holder.get("boot") != _boot():
        remedy = f"if that run is dead, which {host} cannot tell, delete {str(path)!r}"
    return f"output_dir {str(path.parent)!r} is in use by {who}: {remedy}"
