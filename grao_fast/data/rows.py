"""Rows that stay where they are, in a file or in Arrow's memory map, until they are asked for."""

from __future__ import annotations

import hashlib
import os
import time
import weakref
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from grao_fast.data.fields import TEMPLATE_COLUMNS
from grao_fast.data.sizes import column_sizes, text_size
from grao_fast.system.digests import digest_rows
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]

T = TypeVar("T")

logger = get_logger(__name__)

_CHUNK = 512  # rows that are read at once
_PACE = 10.0  # seconds between log lines
_BYTES = 1 << 20  # of a file that are digested at once
_LENGTH = 16  # hexadecimal digits of a digest


class Rows(Sequence[Row]):
    """The rows of a dataset, by their numbers."""

    @abstractmethod
    def take(self, places: Sequence[int]) -> list[Row]:
        """Read some rows."""

    @abstractmethod
    def sizes(self, columns: Sequence[str]) -> np.ndarray:
        """For every row, at least the bytes of text in some columns; int64.

        A row in a text file counts whole.
        """

    @abstractmethod
    def digest(self) -> str:
        """Return a digest of the content, for which no row is made."""

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return self.take(range(len(self))[place])
        return self.take([range(len(self))[place]])[0]

    def __iter__(self) -> Iterator[Row]:
        for places in chunks(range(len(self))):
            yield from self.take(places)


class ListRows(Rows):
    """Rows that are a list of dicts already."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, places: Sequence[int]) -> list[Row]:
        return [self._rows[place] for place in places]

    def sizes(self, columns: Sequence[str]) -> np.ndarray:
        return np.array(
            [sum(text_size(row.get(name)) for name in columns) for row in self._rows], np.int64
        )

    def digest(self) -> str:
        return digest_rows(self._rows)


class ArrowRows(Rows):
    """The rows of a `datasets.Dataset`, which are in a memory map or in Arrow's memory."""

    def __init__(self, dataset: Dataset) -> None:
        # with_format(None): plain Python values, whatever format the caller had set
        self._dataset = dataset.with_format(None)

    def __len__(self) -> int:
        return len(self._dataset)

    def take(self, places: Sequence[int]) -> list[Row]:
        columns = self._dataset[list(places)]
        each = zip(*columns.values(), strict=True)
        return [without_padding(dict(zip(columns, values, strict=True))) for values in each]

    def sizes(self, columns: Sequence[str]) -> np.ndarray:
        chosen = self._dataset.select_columns(list(columns)).with_format("arrow")
        parts = [
            sum(column_sizes(column) for column in table.columns)
            for table in chosen.iter(batch_size=1 << 16)
        ]
        return np.concatenate(parts).astype(np.int64)

    def digest(self) -> str:
        digest = hashlib.sha256(str(self._dataset.features).encode())
        for table in self._dataset.with_format("arrow").iter(batch_size=1 << 14):
            for batch in table.combine_chunks().to_batches():
                digest.update(batch.serialize())
        return digest.hexdigest()[:_LENGTH]


class FileRows(Rows):
    """The rows of a text file, of which one or more lines each are decoded when asked for.

    Args:
        descriptor: of the uncompressed file, open for reading; it is duplicated.
        name: of the file, for errors.
        starts, lengths: the bytes of every row.
        lines: the number of every row's first line.
        decode: bytes and the number of their first line -> row.
    """

    def __init__(
        self,
        descriptor: int,
        name: str,
        *,
        starts: array[int],
        lengths: array[int],
        lines: array[int],
        decode: Callable[[bytes, int], Row],
    ) -> None:
        self._file, self._name, self._decode = os.dup(descriptor), name, decode
        self._starts, self._lengths, self._lines = starts, lengths, lines
        self._state = self._stamp()
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self._starts)

    def take(self, places: Sequence[int]) -> list[Row]:
        self._check()
        return [
            self._decode(
                os.pread(self._file, self._lengths[place], self._starts[place]), self._lines[place]
            )
            for place in places
        ]

    def sizes(self, columns: Sequence[str]) -> np.ndarray:
        return np.array(self._lengths, np.int64)

    def digest(self) -> str:
        self._check()
        digest, offset = hashlib.sha256(), 0
        while data := os.pread(self._file, _BYTES, offset):
            digest.update(data)
            offset += len(data)
        return digest.hexdigest()[:_LENGTH]

    def _stamp(self) -> tuple[int, int]:
        found = os.fstat(self._file)
        return found.st_size, found.st_mtime_ns

    def _check(self) -> None:
        if self._stamp() != self._state:
            raise UserError(
                f"{self._name} has been written to since it was opened, and its rows are read as "
                "they are drawn: leave a run its dataset, or copy the file first"
            )


class ChainedRows(Rows):
    """The rows of several files, one after another."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._stops = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def take(self, places: Sequence[int]) -> list[Row]:
        rows = []
        for place in places:
            part = int(np.searchsorted(self._stops, place, side="right"))
            start = int(self._stops[part]) - len(self._parts[part])
            rows += self._parts[part].take([place - start])
        return rows

    def sizes(self, columns: Sequence[str]) -> np.ndarray:
        return np.concatenate([part.sizes(columns) for part in self._parts])

    def digest(self) -> str:
        return digest_rows([part.digest() for part in self._parts])


def chunks(places: Sequence[int]) -> Iterator[Sequence[int]]:
    """Split places into parts that are read at once."""
    return (places[start : start + _CHUNK] for start in range(0, len(places), _CHUNK))


def paced(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield items, and log every ten seconds how many of them are done."""
    started = logged = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - logged >= _PACE:
            logged = now
            logger.info("%s: %d of %d after %.0f s", what, done, total, now - started)
        yield item


def without_padding(row: dict[str, Any]) -> dict[str, Any]:
    """Remove the keys that are None from an Arrow row's messages and what goes to its template.

    Arrow gives every object in a column the keys of all others, so that a tool call would seem to
    have the arguments of every other tool. Other columns stay as Arrow has them.
    """
    return {
        name: _without_none(value) if name in TEMPLATE_COLUMNS or _are_messages(value) else value
        for name, value in row.items()
    }


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
