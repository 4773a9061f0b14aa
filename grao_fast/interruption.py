"""Signals that ask a run to stop: Ctrl-C, a scheduler's SIGTERM, a closed terminal's SIGHUP.

Python would raise in the middle of anything, or end the process where it stands. Here a signal
raises `Stop` at once where what is under way can be done again (sampling, a reward, an evaluation,
a gradient), and otherwise (an optimiser's step, a save) as soon as that is done.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from grao_fast.visible import visible

logger = logging.getLogger(__name__)

# Windows has no SIGHUP.
_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


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
    """Turns signals into `Stop` while it is entered, and gives handlers back as they were.

    Only the main thread gets signals: entered in another, or inside another Interruption, it does
    nothing. A signal that is ignored (nohup, a shell's background job) stays ignored. A handler of
    the caller's own is called when the run has saved what it had. A second Ctrl-C raises at once,
    wherever it comes; every other further signal changes nothing, as the run is about to end.

    signum: the signal that came; None while there was none.
    aborted: whether a Ctrl-C came after it: nothing more is to be saved.
    checkpoint: set by the run, for what is raised.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.aborted = False
        self.checkpoint: Path | None = None
        self._previous: dict[int, Any] = {}
        self._raises = True
        self._process = os.getpid()

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
        global _active
        if _active is not self:
            return
        _active = None
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)
        if self.signum is None:
            return
        # Also where the run had ended by then: the signal is not lost on the caller. Another error
        # came of it, as when a judge's or a sampler's own process got it too.
        if error is not None and not isinstance(error, Stop):
            logger.warning("%s after the signal: %s", type(error).__name__, visible(str(error)))
        own_handler = self._previous[self.signum]
        if callable(own_handler) and own_handler is not signal.default_int_handler:
            own_handler(self.signum, None)
        if self.signum == signal.SIGINT:
            raise KeyboardInterrupt("stopped by Ctrl-C") from None
        raise Preempted(self.signum, self.checkpoint) from None

    def check(self) -> None:
        """Raise Stop where a signal has come."""
        if self.signum is not None:
            raise Stop(self.signum)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a child that inherited this handler by a fork
            signal.signal(signum, self._previous[signum])
            os.kill(os.getpid(), signum)
            return
        if self.signum is not None:
            if signum == signal.SIGINT:
                self.aborted = True
                raise Stop(signum)
            return
        self.signum = signum
        if self._raises:
            raise Stop(signum)

    @contextmanager
    def _mode(self, *, raises: bool) -> Iterator[None]:
        before, self._raises = self._raises, raises
        try:
            if raises:
                self.check()
            yield
        finally:
            self._raises = before
        # Also where code inside has caught Stop and gone on.
        if raises or before:
            self.check()


_active: Interruption | None = None


@contextmanager
def held() -> Iterator[None]:
    """Signals that come inside are noted, and raise on the way out."""
    if _active is None or _away():
        yield
        return
    with _active._mode(raises=False):
        yield


@contextmanager
def at_once() -> Iterator[None]:
    """Inside `held`: what is done here can be done again, so that signals raise at once."""
    if _active is None or _away():
        yield
        return
    with _active._mode(raises=True):
        yield


def _away() -> bool:
    return threading.current_thread() is not threading.main_thread()


def is_interrupt(error: BaseException) -> bool:
    """Whether an exception comes of a signal, and not of the code that it came out of."""
    if isinstance(error, Stop):
        return True
    # Where no Interruption is entered, Python's own handler raises it in the main thread.
    return isinstance(error, KeyboardInterrupt) and _active is None and not _away()
