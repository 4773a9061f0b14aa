"""Rewrites the parser's errors as one line that names the remedy."""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin

from grao_fast.system.errors import nearest
from grao_fast.system.visible import squeezed


def explain(message: str, command: str, hints: dict[str, Any], commands: Sequence[str]) -> str:
    """Return an error of the parser as one line.

    Args:
        message: jsonargparse's message, which may span lines and name its own classes.
        command: the subcommand; "" if none was recognised.
        hints: the types of the subcommand's options.
        commands: all subcommands.
    """
    where = f"{command} --help".lstrip()
    if not command:
        wrong = re.search(r"invalid choice: '([^']*)'", message)
        if wrong:
            near = nearest(wrong[1], commands)
            return f"no such command {wrong[1]!r}{near}; commands: {', '.join(commands)}"
        if "to be one of" in message:
            return f"a command is needed: {', '.join(commands)}"
    if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
        if not unknown[1].startswith("-"):
            return f"unexpected argument {unknown[1]!r}; see grao-fast {where}"
        near = nearest(unknown[1].lstrip("-"), list(hints), "--")
        return f"unknown option {unknown[1]}{near}; see grao-fast {where}"
    if unknown := re.search(r"does not accept (?:option|nested key|key) '([^']+)'", message):
        near = nearest(unknown[1], list(hints))
        return f"unknown key {unknown[1]!r} in the config file{near}; see grao-fast {where}"
    if missing := re.search(r"arguments are required: (.+)", message):
        keys = [key.removeprefix(f"{command}.") for key in missing[1].split(", ")]
        positional = {"output_dir": "output_dir", "output_dirs": "DIR"}
        flags = ", ".join(positional.get(key, f"--{key}") for key in keys)
        return f"missing {flags}; see grao-fast {where}"
    key = re.match(r'Parser key "([^"]+)":', message)
    value = re.search(r"(?:Got value|Given value): (.*)", message)
    if key and value and key[1].removeprefix(f"{command}.") in hints:
        name = key[1].removeprefix(f"{command}.")
        return f"{name} must be {describe(hints[name])}, got {value[1]!r}"
    message = message.replace('Parser key "config":', "--config:")
    return squeezed(message.replace('"<unicode string>"', "the config file"))


def describe(hint: Any) -> str:
    """Return a type in words: `int | None` is "an integer or null"."""
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
