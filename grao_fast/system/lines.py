"""Reads and writes JSON Lines files: metrics.jsonl, completions.jsonl, the rows of an evaluation.

A line is written completely or not at all, unless the process is killed while writing it or the
disk is damaged. Lines that cannot be read are skipped, with a warning that counts them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from grao_fast.system.errors import first_of
from grao_fast.system.files import write_file
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"


class LineFile:
    """A file to which a run appends lines.

    Args:
        path: the path of the file.
        keep_to: the last step whose lines are kept; a run that resumes there writes the later ones
            again. 0 starts the file afresh.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, *, keep_to: int) -> None:
        self.path = path
        kept = _readable(path) if keep_to > 0 and path.exists() else []
        lines = [line.decode() + "\n" for line, row in kept if row["step"] <= keep_to]
        write_file(path, "".join(lines))
        self._file = path.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line; NaN and infinity become null."""
        rest = memoryview((_dump(row) + "\n").encode(errors="backslashreplace"))
        size = os.fstat(self._file.fileno()).st_size
        try:
            while rest:  # a disk that fills up takes only some of the bytes
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(size)
            free = shutil.disk_usage(self.path.parent).free / 2**20
            raise OSError(
                f"{error.strerror} while a line was written to {str(self.path)!r} "
                f"({free:.1f} MiB are free): make room; the lines before it are intact"
            ) from error

    def flush(self) -> None:
        """Flush all lines to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a file, which each have a step; lines that cannot be read are skipped."""
    return [row for _, row in _readable(Path(path))]


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a file, with or without a step; lines that cannot be read are skipped."""
    lines = Path(path).read_bytes().split(b"\n")
    return [row for line in lines if (row := _object(line)) is not None]


def read_ends(path: str | Path, rows: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read the first and the last rows of a file of any size, at most so many of each.

    Lines that cannot be read are skipped. In a short file the two overlap.
    """
    first: list[dict[str, Any]] = []
    latest: deque[bytes] = deque(maxlen=rows + 1)  # the last line may be torn
    with Path(path).open("rb") as file:
        for line in file:
            latest.append(line)
            if len(first) < rows and (row := _row(line)) is not None:
                first.append(row)
    read = (_row(line) for line in latest)
    return first, [row for row in read if row is not None][-rows:]


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a whole file of lines; NaN and infinity become null."""
    write_file(path, "".join(_dump(row) + "\n" for row in rows))


def _readable(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return lines and their rows; an incomplete last line is skipped without a warning."""
    # not splitlines(), which also splits at U+2028 inside a string
    *lines, last = path.read_bytes().split(b"\n")
    read = [(number, line, _row(line)) for number, line in enumerate([*lines, last], start=1)]
    broken = [number for number, _, row in read if row is None and number <= len(lines)]
    if broken:
        logger.warning("%s: line %s cannot be read: left out", path, first_of(broken))
    return [(line, row) for _, line, row in read if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    """Parse a line as a row with a step; None if it is not one."""
    row = _object(line)
    return row if row is not None and type(row.get("step")) is int else None


def _object(line: bytes) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):
        row = json.loads(line.decode())
        if isinstance(row, dict):
            return row
    return None


def _dump(row: Mapping[str, Any]) -> str:
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False, default=str)


def _plain(value: Any) -> Any:
    """Convert a value to types that JSON has: tuples to lists, NaN and infinity to null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
