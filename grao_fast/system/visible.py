"""Text of others, made safe to show.

What a model says and what a dataset holds can carry control characters. Written to a terminal raw
they recolour it, retitle it, write its clipboard, overwrite lines, or turn their order around.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_CONTROL = (*range(0x20), 0x7F, *range(0x80, 0xA0))
_BIDIRECTIONAL = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x2070))
_SEPARATORS = (0x2028, 0x2029)
_LONGEST_CHAIN = 100  # of causes, which could go round in a circle
_SURROGATES = range(0xD800, 0xE000)


def _escapes(codes: Iterable[int]) -> dict[int, str]:
    return {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in codes}


_ESCAPES = _escapes((*_CONTROL, *_BIDIRECTIONAL, *_SEPARATORS, *_SURROGATES))
_BY_NAME = {ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r"}
_IN_LINES = {code: text for code, text in _ESCAPES.items() if chr(code) not in "\n\t"}


def visible(text: str) -> str:
    r"""Text on one line, in which control characters are seen and not obeyed: "\x1b", "\n".

    So are bidirectional marks, line separators and lone surrogates, which no encoding can write.
    """
    return text.translate(_ESCAPES | _BY_NAME)


def visible_lines(text: str) -> str:
    """As `visible`, of text that may have lines and tabs."""
    return text.translate(_IN_LINES)


def squeezed(text: str) -> str:
    """Text on one line, every run of white space a single space, the rest `visible`."""
    return visible(" ".join(text.split()))


@contextmanager
def visible_errors() -> Iterator[None]:
    """Errors that leave have messages that are `visible_lines`, and so have their causes.

    They quote names, values and what libraries say of them, and end up on a terminal.
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
    """Formats log records, of whatever library, as `visible_lines`."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        return visible_lines(super().format(record))


def get_logger(name: str) -> logging.Logger:
    """`logging.getLogger`, whose records are `visible_lines`, as they name what others named."""
    logger = logging.getLogger(name)
    logger.addFilter(_be_visible)
    return logger


def _be_visible(record: logging.LogRecord) -> bool:
    record.msg, record.args = visible_lines(record.getMessage()), ()
    return True
