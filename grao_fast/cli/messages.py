"""What the command says when something is wrong: one line, with the remedy."""

from __future__ import annotations

import difflib
import dis
import os
import re
import traceback
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin


def explain(message: str, command: str, hints: dict[str, Any], commands: Sequence[str]) -> str:
    """A parser's complaint as one line.

    Args:
        message: what jsonargparse says; may span lines and name its own classes.
        command: the subcommand, or "" where none was recognised.
        hints: type of each of its options.
        commands: all subcommands.
    """
    where = f"{command} --help".lstrip()
    if not command:
        wrong = re.search(r"invalid choice: '([^']*)'", message)
        if wrong:
            near = _nearest(wrong[1], commands)
            return f"no such command {wrong[1]!r}{near}; commands: {', '.join(commands)}"
        if "to be one of" in message:
            return f"a command is needed: {', '.join(commands)}"
    if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
        if not unknown[1].startswith("-"):
            return f"unexpected argument {unknown[1]!r}; see grao-fast {where}"
        near = _nearest(unknown[1].lstrip("-"), list(hints), "--")
        return f"unknown option {unknown[1]}{near}; see grao-fast {where}"
    if unknown := re.search(r"does not accept (?:option|nested key|key) '([^']+)'", message):
        near = _nearest(unknown[1], list(hints))
        return f"unknown key {unknown[1]!r} in the config file{near}; see grao-fast {where}"
    if missing := re.search(r"arguments are required: (.+)", message):
        keys = [key.removeprefix(f"{command}.") for key in missing[1].split(", ")]
        flags = ", ".join(key if key == "output_dir" else f"--{key}" for key in keys)
        return f"missing {flags}; see grao-fast {where}"
    key = re.match(r'Parser key "([^"]+)":', message)
    value = re.search(r"(?:Got value|Given value): (.*)", message)
    if key and value and key[1].removeprefix(f"{command}.") in hints:
        name = key[1].removeprefix(f"{command}.")
        return f"{name} must be {describe(hints[name])}, got {value[1]!r}"
    message = message.replace('Parser key "config":', "--config:")
    return " ".join(message.replace('"<unicode string>"', "the config file").split())


def _nearest(word: str, known: Sequence[str], prefix: str = "") -> str:
    found = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {prefix}{found[0]}?)" if found else ""


def describe(hint: Any) -> str:
    """A type in words: `int | None` is "int or null"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is type(None):
        return "null"
    if origin is Literal:
        return ", ".join(map(str, arguments[:-1])) + f" or {arguments[-1]}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin in (list, tuple):
        return f"a list [{describe(arguments[0])}, ...]"
    return {bool: "true, false", str: "text", float: "a number", int: "an integer"}[hint]


def is_users_fault(error: BaseException) -> bool:
    """Whether an error tells the user what to change, so that its message is all they need.

    Files are the user's. Any other error is where a `raise` of this package made it on purpose; one
    that comes out of a library or a builtin is a bug, ours or theirs: its traceback is wanted.
    """
    if isinstance(error, OSError):
        return True
    trace = error.__traceback__
    assert trace is not None, "the error has been caught"
    while trace.tb_next is not None:
        trace = trace.tb_next
    instruction = trace.tb_frame.f_code.co_code[trace.tb_lasti]
    return _is_ours(trace.tb_frame) and dis.opname[instruction] == "RAISE_VARARGS"


def one_line(error: BaseException) -> str:
    """An exception's message without its line breaks; for a reward that failed, where it did."""
    text = " ".join(str(error).split()) or type(error).__name__
    # By name: importing the class would bring in torch, only to say that a file is missing.
    if type(error).__name__ == "RewardError" and error.__cause__ is not None:
        for frame, line in traceback.walk_tb(error.__cause__.__traceback__):
            file = frame.f_code.co_filename
            if not _is_ours(frame) and os.path.isfile(file):
                return f"{text} ({file}, line {line})"
    return text


def _is_ours(frame: types.FrameType) -> bool:
    return frame.f_globals.get("__name__", "").split(".")[0] == "grao_fast"
