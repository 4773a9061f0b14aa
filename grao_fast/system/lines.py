"""JSON lines files of a run: metrics.jsonl, completions.jsonl, the rows of an evaluation.

A line is written at once or not at all, so that only a process killed in the middle of one, or a
damaged disk, leaves a line that cannot be read. Such lines are left out, and counted out loud.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from grao_fast.system.files import write_file
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"


class LineFile:
    """A file of lines that grows while a run goes on.

    Args:
        path: of the file.
        keep_to: lines of this step and those before it are kept, as they are; the run that goes on
            from there writes the later ones itself. 0 begins the file anew.

    Raises:
        OSError: it cannot be written.
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
            while rest:  # a disk that fills up takes a part
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(size)
            free = shutil.disk_usage(self.path.parent).free / 2**20
            raise OSError(
                f"{error.strerror} while a line was written to {str(self.path)!r} "
                f"({free:.1f} MiB are free): the lines before it are whole"
            ) from error

    def flush(self) -> None:
        """Return when all lines are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file of lines that each have a step; what cannot be read is left out."""
    return [row for _, row in _readable(Path(path))]


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a whole file of lines; NaN and infinity become null."""
    write_file(path, "".join(_dump(row) + "\n" for row in rows))


def _readable(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Lines and their rows. A torn last line, as a killed run leaves it, needs no word."""
    # not splitlines(), which also splits at U+2028 inside a string
    *lines, last = path.read_bytes().split(b"\n")
    read = [(number, line, _row(line)) for number, line in enumerate([*lines, last], start=1)]
    broken = [number for number, _, row in read if row is None and number <= len(lines)]
    if broken:
        logger.warning(
            "%s: line %d%s cannot be read and is left out", path, broken[0],
            f" (and {len(broken) - 1} more)" if len(broken) > 1 else "",
        )  # fmt: skip
    return [(line, row) for _, line, row in read if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    """A line as a row with a step, or None."""
    with suppress(ValueError, RecursionError):
        row = json.loads(line.decode())
        if isinstance(row, dict) and type(row.get("step")) is int:
            return row
    return None


def _dump(row: Mapping[str, Any]) -> str:
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False, default=str)


def _plain(value: Any) -> Any:
    """Data that JSON has: no tuples, no NaN, no infinity."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
