"""Reads the rows of JSON and CSV files, with every value exactly as in the file.

The rows stay in the file, whose lines are found here, and are decoded when they are asked for; of a
compressed file, in a temporary copy.

`datasets` reads these formats into typed columns: text that looks like a date becomes a date,
"None" and "NA" in a CSV file become null, 00501 becomes 501, and an object gains the keys of all
others in its column. Here a JSON value keeps its JSON type, and a CSV cell is text.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import shutil
import tempfile
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import PurePath
from typing import IO, Any, cast

from fsspec.compression import compr

from grao_fast.data.rows import FileRows, ListRows, Rows
from grao_fast.system.errors import UserError

Row = dict[str, Any]

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zip": "zip"}

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_LONGEST_CELL = 2**31 - 1  # characters; the csv module's default is 131072
_DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile)


def read_json(
    path: str, *, name: str = "", encoding: str = "utf-8", field: str | None = None
) -> Rows:
    """Return the rows of a JSON Lines file, or of one JSON array of objects.

    Args:
        path: the file, compressed or not.
        name: the file's name for errors, whose extension tells the compression; default: path.
        encoding: the encoding of the text; a UTF-8 byte order mark is skipped.
        field: if the file is one object, the key of its rows.

    Raises:
        ValueError: the file cannot be read, or an array in it is not JSON. A line that is not text,
            not JSON or not an object raises it when the row is asked for.
    """
    name = name or path
    decoder = json.JSONDecoder(object_pairs_hook=_object)

    def decode(data: bytes, number: int) -> Row:
        with _naming(name, number):
            row = decoder.decode(_decoded(data, number, name, encoding))
        return _checked(row, f"{name}, line {number}")

    with _stored(path, name) as file:
        places = _Places()
        lines = _lines(file)
        for number, start, line in lines:
            if not line.strip():
                continue
            if not places.starts and not _is_row(line, number, name, encoding, decoder, field):
                rest = chain([(number, start, line)], lines)
                text = "".join(_decoded(data, n, name, encoding) for n, _, data in rest)
                with _naming(name, number):
                    return ListRows(_read_document(text, decoder, name, field))
            places.add(start, len(line), number)
        return places.rows(file, name, decode)


def _is_row(
    line: bytes,
    number: int,
    name: str,
    encoding: str,
    decoder: json.JSONDecoder,
    field: str | None,
) -> bool:
    """Whether the first line of a file is a row; if not, it begins a document of many lines."""
    text = _decoded(line, number, name, encoding)
    if field is not None or text.lstrip().startswith("["):
        return False
    with _naming(name, number):
        try:
            decoder.decode(text)
        except json.JSONDecodeError:
            return False
    return True


def read_csv(path: str, *, name: str = "", encoding: str = "utf-8", delimiter: str = ",") -> Rows:
    """Return the rows of a CSV file with a header; every cell is text, possibly empty.

    Columns without a name, such as the index that pandas writes, are left out. Arguments and errors
    are those of `read_json`; that rows have the header's cells is checked for the whole file.
    """
    name = name or path

    def decode(data: bytes, number: int) -> Row:
        texts = io.StringIO(_decoded(data, number, name, encoding), newline="\n")
        with _long_cells():
            (cells,) = csv.reader(texts, delimiter=delimiter, strict=True)
        return {key: cell for key, cell in zip(header, cells, strict=True) if key}

    with _stored(path, name) as file, _long_cells():
        header, places = _find_records(file, name, encoding, delimiter)
        return places.rows(file, name, decode)


@contextmanager
def _long_cells() -> Iterator[None]:
    """Let cells be of any length; the limit holds for the whole process."""
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _find_records(
    file: IO[bytes], name: str, encoding: str, delimiter: str
) -> tuple[list[str], _Places]:
    """Return the header of a CSV file and the places of its records, each of one or more lines."""
    header: list[str] = []
    places, end, last = _Places(), 0, 0  # end: of the lines that the reader has taken

    def texts() -> Iterator[str]:
        nonlocal end, last
        for number, start, line in _lines(file):
            end, last = start + len(line), number
            yield _decoded(line, number, name, encoding)

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    start, number = 0, 1
    try:
        for cells in reader:
            if cells and not header:
                header = cells
                twice = next((c for c in header if c and header.count(c) > 1), None)
                if twice is not None:
                    raise UserError(f"{name} has several columns called `{twice}`: rename them")
            elif cells:  # not a blank line
                if len(cells) != len(header):
                    raise UserError(
                        f"{name}, line {reader.line_num} has {len(cells)} cells, but the header "
                        f"has {len(header)}"
                    )
                places.add(start, end - start, number)
            start, number = end, last + 1
    except csv.Error as error:
        raise UserError(f"{name}, line {reader.line_num} is not CSV: {error}") from error
    return header, places


class _Places:
    """Where the rows of a file are: their bytes, and the numbers of their first lines."""

    def __init__(self) -> None:
        self.starts, self.lengths, self.lines = array("q"), array("q"), array("q")

    def add(self, start: int, length: int, line: int) -> None:
        self.starts.append(start)
        self.lengths.append(length)
        self.lines.append(line)

    def rows(self, file: IO[bytes], name: str, decode: Callable[[bytes, int], Row]) -> FileRows:
        return FileRows(
            file.fileno(),
            name,
            starts=self.starts,
            lengths=self.lengths,
            lines=self.lines,
            decode=decode,
        )


def _read_document(text: str, decoder: json.JSONDecoder, name: str, field: str | None) -> list[Row]:
    """Rows of one array, or of consecutive objects that may span lines."""
    values: list[Any] = []
    end = _skip_blank(text, 0)
    while end < len(text):
        value, end = decoder.raw_decode(text, end)
        values.append(value)
        end = _skip_blank(text, end)
    if field is not None:
        if len(values) != 1 or not isinstance(values[0], dict) or field not in values[0]:
            raise UserError(f"{name} is not one JSON object with the key `{field}`")
        values = [values[0][field]]
    rows = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    return [_checked(row, f"{name}, row {index}") for index, row in enumerate(rows)]


def _skip_blank(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start


def _object(pairs: list[tuple[str, Any]]) -> Row:
    """Return a JSON object; a repeated key, whose value is ambiguous, raises _KeyTwice."""
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _KeyTwice(f"an object has the key `{twice}` twice")
    return row


class _KeyTwice(ValueError):
    pass


@contextmanager
def _naming(name: str, first_line: int) -> Iterator[None]:
    """Raise the decoder's errors as UserErrors that name the file and the line."""
    try:
        yield
    except RecursionError as error:
        raise UserError(
            f"{name}, line {first_line} or after: lists or objects are nested too deeply to be read"
        ) from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(
            f"{name}, line {line} is not JSON: {error.msg} (character {error.colno})"
        ) from error
    except _KeyTwice as error:
        raise UserError(f"{name}, line {first_line} or after: {error}") from error


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where} must be a JSON object, got {type(row).__name__}")
    return row


@contextmanager
def _stored(path: str, name: str) -> Iterator[IO[bytes]]:
    """Open a file for reading at any place; of a compressed one, an uncompressed temporary copy."""
    with _open(path, name) as file:
        if PurePath(name).suffix.lower() not in COMPRESSIONS:
            yield file
            return
        with tempfile.TemporaryFile() as copy:  # without a name: it goes when the rows do
            shutil.copyfileobj(file, copy)
            copy.flush()
            copy.seek(0)
            yield cast("IO[bytes]", copy)


@contextmanager
def _open(path: str, name: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed. Raises UserError, with its name, if it is damaged."""
    compression = COMPRESSIONS.get(PurePath(name).suffix.lower())
    try:
        if compression == "zip":
            with zipfile.ZipFile(path) as archive:
                files = len(archive.namelist())
            if files != 1:
                raise UserError(f"{name} holds {files} files: unpack it, and give the folder")
        with open(path, "rb") as raw:
            if compression == "zstd":
                yield _uncompress_zstd(raw, name)
            else:
                yield cast("IO[bytes]", compr[compression](raw, mode="rb") if compression else raw)
    except _DAMAGED as error:
        raise UserError(f"cannot read {name}: {error}") from error


def _uncompress_zstd(raw: IO[bytes], name: str) -> IO[bytes]:
    """Read all frames of a Zstandard file; the library's own readers stop after the first."""
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"cannot read {name}: zstd needs `pip install zstandard`") from error
    left, contents = raw.read(), []
    while left:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            contents.append(frame.decompress(left))
        except zstandard.ZstdError as error:
            raise UserError(f"cannot read {name}: {error}") from error
        if not frame.eof:
            raise UserError(f"cannot read {name}: it ends in the middle of compressed data")
        left = frame.unused_data
    return io.BytesIO(b"".join(contents))


def _lines(file: Iterable[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Yield the number, from 1, the first byte, and the bytes of every line, with its break.

    A UTF-8 byte order mark is left out.
    """
    start = 0
    for number, line in enumerate(file, start=1):
        if number == 1 and line.startswith(_BOM):
            line, start = line[len(_BOM) :], len(_BOM)
        yield number, start, line
        start += len(line)


def _decoded(data: bytes, number: int, name: str, encoding: str) -> str:
    """Decode one or more lines, the first of which has a number. Raises UserError."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        guess = "UTF-16" if number == 1 and data.startswith(_UTF16) else "ISO-8859-1"
        raise UserError(
            f"{name}, line {number}: byte {error.start} (0x{data[error.start]:02x}) is not "
            f"{encoding.upper()}; convert the file, as with iconv -f {guess} -t UTF-8"
        ) from error
