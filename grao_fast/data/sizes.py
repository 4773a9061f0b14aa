"""Sizes of texts in bytes, which bound the number of their tokens before they are tokenised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_FEW = 10_000  # examples
_SAMPLE = 2048  # of more than a few
_SAMPLE_BYTES = 32 * 2**20
_LARGEST = 256  # examples
_PER_FIELD = 8  # quotes, colon, comma and indentation that a template may write beside a field
_PER_VALUE = 24  # a number or a constant, as text


class Sizes(NamedTuple):
    """Bytes of the prompt of every example, of prompt and reference, and of its group; int64.

    The group is prompt and reference with the completions that are stored.
    """

    prompt: np.ndarray
    whole: np.ndarray
    group: np.ndarray

    def sample(self) -> Sequence[int]:
        """Places of examples at even distances, as many as are soon tokenised; all of a few."""
        n, affordable = len(self.whole), int(_SAMPLE_BYTES // max(1.0, float(self.whole.mean())))
        return spread(n, max(1, min(n if n <= _FEW else _SAMPLE, affordable)))

    def largest(self) -> list[int]:
        """Places of the largest examples: by prompt, as a whole, and by group."""
        most = min(_LARGEST, len(self.whole))
        places = (np.argpartition(each, -most)[-most:] for each in self)
        return np.unique(np.concatenate(list(places))).tolist()


def spread(n: int, most: int) -> Sequence[int]:
    """Up to `most` of the numbers below n, at even distances; all if there are no more."""
    return range(n) if n <= most else [place * n // most for place in range(most)]


def text_size(value: Any) -> int:
    """Bytes of the text in a value, which may be nested, with the names of its fields."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, Mapping):
        items = value.items()
        return sum(len(str(key)) + _PER_FIELD + text_size(item) for key, item in items)
    if isinstance(value, Sequence):
        return sum(text_size(item) + _PER_FIELD for item in value)
    return 0 if value is None else _PER_VALUE


def column_sizes(column: pa.ChunkedArray) -> np.ndarray:
    """`text_size` of every value of an Arrow column, without making Python objects of them."""
    return np.concatenate([np.zeros(0, np.int64), *(_sizes(chunk) for chunk in column.chunks)])


def _sizes(values: Any) -> np.ndarray:
    kind = values.type
    if isinstance(values, pa.ExtensionArray):
        return _sizes(values.storage)
    if pa.types.is_dictionary(kind):
        return _sizes(values.dictionary_decode())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pc.fill_null(pc.binary_length(values), 0).to_numpy(zero_copy_only=False)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _of_lists(values, values.flatten())
    if pa.types.is_struct(kind):
        sizes = np.zeros(len(values), np.int64)
        for field, child in zip(kind, values.flatten(), strict=True):
            present = child.is_valid().to_numpy(zero_copy_only=False)
            sizes += (_sizes(child) + len(field.name) + _PER_FIELD) * present
        return sizes
    if pa.types.is_primitive(kind) or pa.types.is_null(kind):
        return np.full(len(values), _PER_VALUE, np.int64)
    return np.array([text_size(value) for value in values.to_pylist()], np.int64)


def _of_lists(lists: Any, items: Any) -> np.ndarray:
    """Sums of the sizes of the items of lists."""
    totals = np.concatenate([[0], np.cumsum(_sizes(items) + _PER_FIELD)])
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    stops = np.cumsum(lengths)
    return totals[stops] - totals[stops - lengths]
