"""Handles signals that stop a run: Ctrl-C, a scheduler's SIGTERM, a closed terminal's SIGHUP.

By default, Python raises KeyboardInterrupt between any two instructions, or the process ends at
once. Here a signal raises `Stop`: immediately in work that can be repeated (sampling, a reward, an
evaluation, a gradient), and at the end of work that cannot (an optimiser step, a save).
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, ParamSpec, TypeVar

from grao_fast.system.visible import get_logger

P = ParamSpec("P")
T = TypeVar("T")

logger = get_logger(__name__)

# Windows has no SIGHUP.
_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
_PATIENCE = 2.0  # seconds after which a signal is sent again to code that has not stopped


class Preempted(SystemExit):
    """A run that SIGTERM or SIGHUP has stopped, after saving the steps that were done.

    Of several processes, Ctrl-C raises it too, in all but the first, as it is shown once.

    Uncaught, it ends the process with `code`, 128 + the number of the signal: 143 or 129, as a
    shell reports a process that a signal ended. To continue, run the same script again with
    `resume_from_checkpoint="auto"`.

    signum: the signal.
    checkpoint: the checkpoint to resume from; None if no step was done.
    """

    def __init__(self, signum: int, checkpoint: Path | None) -> None:
        super().__init__(128 + signum)
        self.signum, self.checkpoint = signum, checkpoint

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"


class Stop(KeyboardInterrupt):
    """Raised by a signal inside a run, which then raises Preempted or KeyboardInterrupt itself.

    It is a KeyboardInterrupt because asyncio and other well-behaved code do not catch that.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Interruption:
    """A context in which the signals that stop a run are handled, as this module describes.

    On leaving, it restores the previous handlers, calls the one of a signal that came, and raises
    KeyboardInterrupt or Preempted. Signals that are ignored (nohup, a shell's background job) stay
    ignored. Only the main thread receives signals: entered in another thread, or inside another
    Interruption, it does nothing. After a first signal, Ctrl-C raises at once, wherever it comes;
    other signals have no further effect, as the run is about to end.

    signum: the signal that came; None if none has.
    aborted: whether Ctrl-C came after it, so that nothing more is to be saved.
    checkpoint: the checkpoint to resume from, which the run sets.
    is_shown: whether this process of several shows that Ctrl-C came, by KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.aborted = False
        self.checkpoint: Path | None = None
        self.is_shown = True
        self._previous: dict[int, Any] = {}
        self._raises = False  # whether a signal raises now
        self._outside: list[bool] = []  # the value of _raises outside of each mode entered
        self._insists = False

    def __enter__(self) -> Interruption:
        global _active
        if _active is not None or threading.current_thread() is not threading.main_thread():
            return self
        _active = self
        for signum in _SIGNALS:
            previous = signal.getsignal(signum)
            # None: the handler was not installed from Python
            if previous is not None and previous != signal.SIG_IGN:
                self._previous[signum] = previous
                signal.signal(signum, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if _active is not self:
            return
        self._leave()
        # A SystemExit ends the process already, as that of a run whose other processes have failed:
        # their launcher may have sent the signal for that reason.
        if self.signum is None or isinstance(error, SystemExit):
            return
        # Raise even if the run ended normally, so that the caller learns of the signal. Another
        # error is a consequence of the signal, as when a sampler's process received it too; a
        # SystemExit is a silent one.
        if error is not None and not isinstance(error, (Stop, SystemExit)):
            logger.warning("%s after the signal: %s", type(error).__name__, error)
        own_handler = self._previous.get(self.signum)  # none for a signal of another process
        if callable(own_handler) and own_handler is not signal.default_int_handler:
            own_handler(self.signum, None)
        if self.signum == signal.SIGINT and self.is_shown:
            raise KeyboardInterrupt("stopped by Ctrl-C") from None
        raise Preempted(self.signum, self.checkpoint) from None

    def _leave(self) -> None:
        global _active
        _active = None
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)

    def check(self) -> None:
        """Raise Stop if a signal has come."""
        if self.signum is not None:
            raise Stop(self.signum)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum
            with suppress(RuntimeError):  # the system may have no thread left
                threading.Thread(target=self._insist, daemon=True).start()
        elif self._insists:
            self._insists = False
        elif signum == signal.SIGINT:
            self.aborted = True
            raise Stop(signum)
        else:
            return
        if self._raises:
            raise Stop(self.signum)

    def _insist(self) -> None:
        """Send the signal again to code that hangs, as a `with` that joins a thread on exit."""
        main = threading.main_thread().ident
        assert main is not None and self.signum is not None
        while hasattr(signal, "pthread_kill"):  # Windows has none
            time.sleep(_PATIENCE)
            if _active is not self:
                return
            if self._raises:
                self._insists = True
                signal.pthread_kill(main, self.signum)

    @contextmanager
    def mode(self, raises: bool) -> Iterator[None]:
        """Let signals raise at once inside, or note them."""
        before = self._raises
        self._outside.append(before)
        try:
            self._raises = raises
            if raises:
                self.check()
            yield
            raises = self._raises  # see hold
        finally:
            self._raises = before
            self._outside.pop()
        # Raise again if code inside has caught Stop and continued.
        if raises or before:
            self.check()


_active: Interruption | None = None


def stoppable(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function to run inside an Interruption, with signals raising at once."""

    @functools.wraps(function)
    def stopped(*args: P.args, **kwargs: P.kwargs) -> T:
        with Interruption(), at_once():
            return function(*args, **kwargs)

    return stopped


def held() -> AbstractContextManager[None]:
    """A context for work that cannot be repeated: signals raise when it ends."""
    active = _here()
    return nullcontext() if active is None else active.mode(raises=False)


def at_once() -> AbstractContextManager[None]:
    """A context for work that can be repeated: signals raise at once."""
    active = _here()
    return nullcontext() if active is None else active.mode(raises=True)


def as_outside() -> AbstractContextManager[None]:
    """A context inside `held` in which signals raise at once if they did so outside of `held`.

    For temporary changes that must be undone even if a signal comes: make and undo them in `held`,
    and work with them in `as_outside`.
    """
    active = _here()
    return nullcontext() if active is None else active.mode(raises=active._outside[-1])


def hold() -> None:
    """Make the rest of an `at_once` context like `held`, since it cannot be repeated."""
    active = _here()
    if active is not None:
        active._raises = False


def check() -> None:
    """Raise Stop again if a signal has come, and code since then has caught it.

    Does nothing inside `held`.
    """
    active = _here()
    if active is not None and active._raises:
        active.check()


def pending() -> int | None:
    """The signal that has come, which may be waiting for the end of `held`; None if none has."""
    active = _here()
    return None if active is None else active.signum


def stop(signum: int) -> NoReturn:
    """Raise Stop as if the signal had come to this process, as it has to another of its run."""
    active = _here()
    if active is not None and active.signum is None:
        active.signum = signum
    raise Stop(signum)


def is_aborted() -> bool:
    """Whether Ctrl-C came after another signal, so that nothing more is to be saved."""
    return _active is not None and _active.aborted


def checkpoint() -> Path | None:
    """The checkpoint that `resumes_from` has set."""
    return None if _active is None else _active.checkpoint


def resumes_from(checkpoint: Path | None) -> None:
    """Set the checkpoint from which a run that is stopped can be resumed."""
    if _active is not None:
        _active.checkpoint = checkpoint


def show(is_shown: bool) -> None:
    """Set whether this process of several is the one that shows that Ctrl-C came."""
    if _active is not None:
        _active.is_shown = is_shown


def _here() -> Interruption | None:
    return _active if threading.current_thread() is threading.main_thread() else None


def is_interrupt(error: BaseException) -> bool:
    """Whether an exception was raised by a signal rather than by the code it came from."""
    if isinstance(error, Stop):
        return True
    # Outside of an Interruption, Python's own handler raises KeyboardInterrupt in the main thread.
    in_main = threading.current_thread() is threading.main_thread()
    return isinstance(error, KeyboardInterrupt) and _active is None and in_main


# A child process that a reward or a sampler forks gets the previous handlers back; otherwise
# `Pool.terminate`, which sends SIGTERM, would wait forever. Signals are blocked during the fork,
# since Python drops those that are pending in the child.
_forking = threading.local()


def _before_fork() -> None:
    _forking.mask = None if _active is None else signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _in_child() -> None:
    if _active is not None:
        _active._leave()
    _in_parent()


def _in_parent() -> None:
    if _forking.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_in_child, after_in_parent=_in_parent)
