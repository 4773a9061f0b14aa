"""Checks the file of --config for errors that YAML does not report: repeated keys, encodings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from grao_fast.system.errors import UserError


def config_files(arguments: Sequence[str]) -> list[str]:
    """Return the files that --config names on a command line."""
    following = pairwise(arguments)
    files = [value for flag, value in following if flag == "--config"]
    prefix = "--config="
    return files + [word.removeprefix(prefix) for word in arguments if word.startswith(prefix)]


def check_no_key_twice(file: str) -> None:
    """Raise UserError if a key occurs twice, where YAML would take the last, or for wrong UTF-8.

    Files that cannot be read, or are not YAML, are left for the parser of the options to report.
    """
    try:
        text = Path(file).expanduser().read_bytes().decode()
        root = yaml.compose(text)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"--config {file}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; "
            "convert the file, as with iconv -f ISO-8859-1 -t UTF-8"
        ) from error
    except (OSError, ValueError, yaml.YAMLError):
        return
    lines: dict[str, int] = {}
    for key, line in _keys(root, ""):
        if key in lines:
            raise UserError(
                f"--config {file}: the key {key!r} occurs twice, in lines {lines[key]} and {line}: "
                "keep one"
            )
        lines[key] = line


def _keys(node: Any, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield keys and their lines; nested keys as `outer.inner`, which users may also write."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = prefix + str(key.value)
        yield name, key.start_mark.line + 1
        yield from _keys(value, f"{name}.")
