"""Standard output and error that cannot fail: what is only shown never stops work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from grao_fast.system.visible import get_logger

logger = get_logger(__name__)


class LenientStream:
    """A text stream whose failures cost what it would have shown, and nothing else.

    Terminals close, pipes break, disks fill up, and some encodings are of few characters.
    """

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name
        self.failed = False

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            # not error.encoding, which is "charmap" for every code page
            encoding = getattr(self._stream, "encoding", None) or error.encoding
            encodable = text.encode(encoding, "backslashreplace").decode(encoding)
            self._try(lambda: self._stream.write(encodable))
        except Exception as error:  # of any kind: a stream can be of anyone's making
            self._fail(error)
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if not getattr(self._stream, "closed", False):
            self._try(self._stream.flush)

    def isatty(self) -> bool:
        with suppress(ValueError):  # it is closed
            return self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, show: Callable[[], Any]) -> None:
        try:
            show()
        except Exception as error:  # as in write
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self.failed:
            return
        self.failed = True  # first, as the log may be written to this very stream
        logger.warning("%s cannot be written, and is left out: %s", self._name, error)


@contextmanager
def lenient_streams(*, to_the_end: bool = False) -> Iterator[None]:
    """Inside, nothing that is written to standard output or error can fail.

    to_the_end: also where Python itself, as it exits, writes what is left in a stream: one that
        fails is closed. For a program, to which the streams belong.
    """
    _occupy_descriptors()
    before = sys.stdout, sys.stderr
    streams = [lenient(stream, name) for stream, name in zip(before, _NAMES, strict=True)]
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.flush()
            if to_the_end and stream.failed:
                _close(stream)


_NAMES = ("standard output", "standard error")


def lenient(stream: Any, name: str) -> LenientStream:
    """The stream as one that cannot fail; `name` is what a warning calls it."""
    if isinstance(stream, LenientStream):
        return stream
    # Python has none where the descriptor was closed when it started.
    return LenientStream(open(os.devnull, "w") if stream is None else stream, name)


def _occupy_descriptors() -> None:
    """Open what is closed of 0, 1 and 2, or a file of the run gets what libraries write there."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _close(stream: LenientStream) -> None:
    """Let the stream's descriptor lead nowhere, so that what is left in it can be written."""
    with suppress(OSError, ValueError):  # it has none, or is closed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream._stream.flush()
