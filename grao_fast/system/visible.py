"""Escapes control characters in text from models, datasets and libraries before it is shown.

Written to a terminal unescaped, they can change its colours and title, write to its clipboard,
overwrite lines, or reverse the order of text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_CONTROL = (*range(0x20), 0x7F, *range(0x80, 0xA0))
_BIDIRECTIONAL = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x2070))
_SEPARATORS = (0x2028, 0x2029)
_LONGEST_CHAIN = 100  # causes of an error, which may form a cycle
_SURROGATES = range(0xD800, 0xE000)


def _escapes(codes: Iterable[int]) -> dict[int, str]:
    return {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in codes}


_ESCAPES = _escapes((*_CONTROL, *_BIDIRECTIONAL, *_SEPARATORS, *_SURROGATES))
_BY_NAME = {ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r"}
_IN_LINES = {code: text for code, text in _ESCAPES.items() if chr(code) not in "\n\t"}


def visible(text: str) -> str:
    r"""Return text with control characters escaped, as in "\x1b" and "\n", on one line.

    Bidirectional marks, line separators and lone surrogates are escaped too.
    """
    return text.translate(_ESCAPES | _BY_NAME)


def visible_lines(text: str) -> str:
    """Return text as `visible` does, but keep line breaks and tabs."""
    return text.translate(_IN_LINES)


def squeezed(text: str) -> str:
    """Return text as `visible` does, with every run of white space as a single space."""
    return visible(" ".join(text.split()))


@contextmanager
def visible_errors() -> Iterator[None]:
    """Escape, as `visible_lines` does, the messages of errors that leave, and of their causes.

    They quote names, values and messages of libraries, and are shown on a terminal.
    """
    try:
        yield
    except Exception as error:  # of any kind: it is raised again
        link: BaseException | None = error
        for _ in range(_LONGEST_CHAIN):
            if link is None:
                break
            if len(link.args) == 1 and isinstance(link.args[0], str):
                link.args = (visible_lines(link.args[0]),)
            link = link.__cause__ or link.__context__
        raise


class VisibleFormatter(logging.Formatter):
    """Formats log records of any library, escaped as by `visible_lines`."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        return visible_lines(super().format(record))


def get_logger(name: str) -> logging.Logger:
    """Return `logging.getLogger(name)`, with its records escaped as by `visible_lines`."""
    logger = logging.getLogger(name)
    logger.addFilter(_be_visible)
    return logger


@contextmanager
def quiet(*, unless: bool) -> Iterator[None]:
    """Log errors alone, in processes whose messages another process of the run shows already."""
    logger = logging.getLogger("grao_fast")
    level = logger.level
    if not unless:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _be_visible(record: logging.LogRecord) -> bool:
    record.msg, record.args = visible_lines(record.getMessage()), ()
    return True
