"""Signals that ask a run to stop: Ctrl-C, a scheduler's SIGTERM, a closed terminal's SIGHUP.

Python would raise in the middle of anything, or end the process where it stands. Here a signal
raises `Stop` at once where what is under way can be done again (sampling, a reward, an evaluation,
a gradient), and otherwise (an optimiser's step, a save) as soon as that is done.
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
from typing import Any, ParamSpec, TypeVar

from grao_fast.system.visible import get_logger

P = ParamSpec("P")
T = TypeVar("T")

logger = get_logger(__name__)

# Windows has no SIGHUP.
_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
_PATIENCE = 2.0  # seconds that code may take to let go


class Preempted(SystemExit):
    """A run was told to stop by SIGTERM or SIGHUP, and what it had done is saved.

    Uncaught it ends the process with `code`, 128 + the signal's number, as a shell would report it:
    143 or 129, which is neither success nor failure. Run the same script again to go on.

    signum: the signal.
    checkpoint: where to go on from; None where no step was done.
    """

    def __init__(self, signum: int, checkpoint: Path | None) -> None:
        super().__init__(128 + signum)
        self.signum, self.checkpoint = signum, checkpoint

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"


class Stop(KeyboardInterrupt):
    """Raised by a signal inside a run; what leaves the run is Preempted or KeyboardInterrupt.

    A KeyboardInterrupt, since asyncio and well-behaved code let those through.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Interruption:
    """Takes note of signals while it is entered, and gives handlers back as they were.

    Only the main thread gets signals: entered in another, or inside another Interruption, it does
    nothing. A signal that is ignored (nohup, a shell's background job) stays ignored. A handler of
    the caller's own is called when the run has saved what it had. Where signals raise is said by
    `at_once`; a second Ctrl-C raises wherever it comes, and every other further signal changes
    nothing, as the run is about to end.

    signum: the signal that came; None while there was none.
    aborted: whether a Ctrl-C came after it: nothing more is to be saved.
    checkpoint: set by the run, for what is raised.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.aborted = False
        self.checkpoint: Path | None = None
        self._previous: dict[int, Any] = {}
        self._raises = False
        self._outside: list[bool] = []  # what _raises was, outside of each mode that is entered
        self._insists = False

    def __enter__(self) -> Interruption:
        global _active
        if _active is not None or threading.current_thread() is not threading.main_thread():
            return self
        _active = self
        for signum in _SIGNALS:
            previous = signal.getsignal(signum)
            # None: it is handled outside of Python.
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
        if self.signum is None:
            return
        # Also where the run had ended by then: the signal is not lost on the caller. Another error
        # came of it, as when a judge's or a sampler's own process got it too.
        if error is not None and not isinstance(error, Stop):
            logger.warning("%s after the signal: %s", type(error).__name__, error)
        own_handler = self._previous[self.signum]
        if callable(own_handler) and own_handler is not signal.default_int_handler:
            own_handler(self.signum, None)
        if self.signum == signal.SIGINT:
            raise KeyboardInterrupt("stopped by Ctrl-C") from None
        raise Preempted(self.signum, self.checkpoint) from None

    def _leave(self) -> None:
        global _active
        _active = None
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)

    def check(self) -> None:
        """Raise Stop where a signal has come."""
        if self.signum is not None:
            raise Stop(self.signum)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum
            with suppress(RuntimeError):  # there may be no thread to be had
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
        """Send the signal again while code hangs: behind a `with` that joins a thread, say."""
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
        """Inside, signals raise at once, or are noted."""
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
        # Also where code inside has caught Stop and gone on.
        if raises or before:
            self.check()


_active: Interruption | None = None


def stoppable(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: an Interruption is entered while the function runs; signals raise `at_once`."""

    @functools.wraps(function)
    def stopped(*args: P.args, **kwargs: P.kwargs) -> T:
        with Interruption(), at_once():
            return function(*args, **kwargs)

    return stopped


def held() -> AbstractContextManager[None]:
    """Signals that come inside are noted, and raise on the way out."""
    active = _here()
    return nullcontext() if active is None else active.mode(raises=False)


def at_once() -> AbstractContextManager[None]:
    """What is done inside can be done again, so that signals raise at once."""
    active = _here()
    return nullcontext() if active is None else active.mode(raises=True)


def as_outside() -> AbstractContextManager[None]:
    """Inside `held`: signals raise at once where they do so outside of it.

    For what must be put back, whatever comes: it is changed and put back in `held`, and used here.
    """
    active = _here()
    return nullcontext() if active is None else active.mode(raises=active._outside[-1])


def hold() -> None:
    """What follows cannot be done again: the rest of an `at_once` is as `held`, to its end."""
    active = _here()
    if active is not None:
        active._raises = False


def check() -> None:
    """Where a signal may raise: raise for one that has come, though code since has caught it."""
    active = _here()
    if active is not None and active._raises:
        active.check()


def is_aborted() -> bool:
    """Whether nothing more is to be saved, as a Ctrl-C came after another signal."""
    return _active is not None and _active.aborted


def resumes_from(checkpoint: Path | None) -> None:
    """Tell whoever is stopped which checkpoint to go on from."""
    if _active is not None:
        _active.checkpoint = checkpoint


def _here() -> Interruption | None:
    return _active if threading.current_thread() is threading.main_thread() else None


def is_interrupt(error: BaseException) -> bool:
    """Whether an exception comes of a signal, and not of the code that it came out of."""
    if isinstance(error, Stop):
        return True
    # Where no Interruption is entered, Python's own handler raises it in the main thread.
    in_main = threading.current_thread() is threading.main_thread()
    return isinstance(error, KeyboardInterrupt) and _active is None and in_main


# A child that a reward or a sampler forks has the handlers of before, or `Pool.terminate`, which
# sends SIGTERM, would wait for ever. Signals wait while it is forked, lest Python forget them.
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
