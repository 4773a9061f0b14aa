"""Reads the rows of JSON and CSV files, with every value exactly as in the file.

`datasets` reads these formats into typed columns: text that looks like a date becomes a date,
"None" and "NA" in a CSV file become null, 00501 becomes 501, and an object gains the keys of all
others in its column. Here a JSON value keeps its JSON type, and a CSV cell is text.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import IO, Any, cast

from fsspec.compression import compr

from grao_fast.system.errors import UserError

Row = dict[str, Any]

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zip": "zip"}

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_LONGEST_CELL = 2**31 - 1  # characters; the csv module's default is 131072
_DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile)


def read_json(
    path: str, *, name: str = "", encoding: str = "utf-8", field: str | None = None
) -> list[Row]:
    """Read the rows of a JSON Lines file, or of one JSON array of objects.

    Args:
        path: the file, compressed or not.
        name: the file's name for errors, whose extension tells the compression; default: path.
        encoding: the encoding of the text; a UTF-8 byte order mark is skipped.
        field: if the file is one object, the key of its rows.

    Raises:
        ValueError: the file cannot be read, or a line is not text, not JSON or not an object.
    """
    name = name or path
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    rows: list[Row] = []
    with _open(path, name) as file:
        lines = _lines(file, name, encoding)
        for number, line in lines:
            if not line.strip():
                continue
            with _naming(name, number):
                first = not rows
                if first and (field is not None or line.lstrip().startswith("[")):
                    return _read_document(_rest(line, lines), decoder, name, field)
                try:
                    row = decoder.decode(line)
                except json.JSONDecodeError:
                    if not first:
                        raise
                    return _read_document(_rest(line, lines), decoder, name, field)
            rows.append(_checked(row, f"{name}, line {number}"))
    return rows


def read_csv(
    path: str, *, name: str = "", encoding: str = "utf-8", delimiter: str = ","
) -> list[Row]:
    """Read the rows of a CSV file with a header; every cell is text, possibly empty.

    Columns without a name, such as the index that pandas writes, are left out. Arguments and errors
    are those of `read_json`.
    """
    name = name or path
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        with _open(path, name) as file:
            texts = (line for _, line in _lines(file, name, encoding))
            return _read_table(csv.reader(texts, delimiter=delimiter, strict=True), name)
    finally:
        csv.field_size_limit(limit)  # the limit holds for the whole process


def _read_table(reader: Any, name: str) -> list[Row]:
    rows: list[Row] = []
    header: list[str] = []
    try:
        for cells in reader:
            if not cells:
                continue  # a blank line
            if not header:
                header = cells
                twice = next((c for c in header if c and header.count(c) > 1), None)
                if twice is not None:
                    raise UserError(f"{name} has several columns called `{twice}`: rename them")
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{name}, line {reader.line_num} has {len(cells)} cells, but the header has "
                    f"{len(header)}"
                )
            rows.append({key: cell for key, cell in zip(header, cells, strict=True) if key})
    except csv.Error as error:
        raise UserError(f"{name}, line {reader.line_num} is not CSV: {error}") from error
    return rows


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


def _rest(line: str, lines: Iterator[tuple[int, str]]) -> str:
    return line + "".join(text for _, text in lines)


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


def _lines(file: Iterable[bytes], name: str, encoding: str) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of every line, with its line break."""
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            yield number, line.decode(encoding)
        except UnicodeDecodeError as error:
            guess = "UTF-16" if number == 1 and line.startswith(_UTF16) else "ISO-8859-1"
            raise UserError(
                f"{name}, line {number}: byte {error.start} (0x{line[error.start]:02x}) is not "
                f"{encoding.upper()}; convert the file, as with iconv -f {guess} -t UTF-8"
            ) from error
