"""Makes standard output and error tolerate failures, so that display never stops a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from grao_fast.system.visible import get_logger

logger = get_logger(__name__)


class LenientStream:
    """A text stream whose failures are logged once and otherwise ignored.

    Terminals close, pipes break, disks fill up, and some encodings lack characters.
    """

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name
        self.failed = False

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            # the stream's encoding, since error.encoding is "charmap" for every code page
            encoding = getattr(self._stream, "encoding", None) or error.encoding
            encodable = text.encode(encoding, "backslashreplace").decode(encoding)
            self._try(lambda: self._stream.write(encodable))
        except Exception as error:  # of any kind: the stream may be of any class
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
        self.failed = True  # before logging, which may write to this stream
        logger.warning("%s cannot be written, and is ignored from now on: %s", self._name, error)


@contextmanager
def lenient_streams(*, to_the_end: bool = False) -> Iterator[None]:
    """A context in which writing to standard output and error cannot fail.

    to_the_end: redirect a stream that failed to nowhere, so that Python can flush it at exit. For a
        program, which owns the streams.
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
    """Wrap a stream so that it cannot fail; `name` is its name in the warning."""
    if isinstance(stream, LenientStream):
        return stream
    # sys.stdout is None if its descriptor was closed when Python started
    return LenientStream(open(os.devnull, "w") if stream is None else stream, name)


def _occupy_descriptors() -> None:
    """Open descriptors 0, 1 and 2 if they are closed.

    Otherwise a file of the run would get one of these numbers, and with it what libraries print.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _close(stream: LenientStream) -> None:
    """Redirect the stream's descriptor to os.devnull, so that its buffer can be flushed."""
    with suppress(OSError, ValueError):  # it has no descriptor, or is closed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream._stream.flush()
