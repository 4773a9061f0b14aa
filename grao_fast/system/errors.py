"""Defines the error that a user can correct, and writes error messages on one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from grao_fast.system.visible import squeezed

_LONGEST_REASON = 300  # characters of a library's message; some quote whole conversations


class UserError(ValueError):
    """An error that the user can correct: an option, a file, a dataset, a model or a reward.

    The message names the value and the remedy, so the command line prints it without a traceback.
    Any other ValueError is a bug.

    place: file and line of the user's code that raised; None unless such code did.
    """

    place: str | None = None


def one_line(error: BaseException, longest: int | None = None) -> str:
    """Return the message of an error on one line, or the name of its type if it has no message.

    longest: the number of characters after which the message is cut; None: not cut.
    """
    return squeezed(str(error))[:longest] or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop, as `one_line` does."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return squeezed(lines[0]).rstrip(".")[:_LONGEST_REASON]


def nearest(word: str, known: Sequence[str], prefix: str = "") -> str:
    """Return " (did you mean ...?)" with the known word nearest to a wrong one; "" if none is."""
    found = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {prefix}{found[0]}?)" if found else ""


def first_of(names: Sequence[object], shown: int = 1) -> str:
    """List the first of some names and count the others: "a and 3 more"."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(str, names[:shown])) + more


@contextmanager
def explained(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn a library's errors of these kinds into a UserError: `what`, the type, the message.

    A UserError within keeps its message, behind `what`.
    """
    try:
        yield
    except kinds as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{what}: {kind}{one_line(error, _LONGEST_REASON)}") from error
