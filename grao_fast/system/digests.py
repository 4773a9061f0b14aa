"""Digests of data and of weights: equal where the content is, in any process and on any day."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from datetime import date, time, timedelta
from decimal import Decimal
from fractions import Fraction
from numbers import Complex, Integral, Real
from pathlib import PurePath
from typing import Any
from uuid import UUID

import numpy as np
import torch
from torch import Tensor

# Of these, the text says all that there is.
_AS_TEXT = (date, time, timedelta, Decimal, Fraction, UUID, PurePath, range, slice)
_LENGTH = 16  # hexadecimal digits of a digest
_CHUNK = 1 << 19  # elements of a tensor that are summed at once
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_SPREAD = 0x1E3779B97F4A7C15


def digest_rows(rows: Iterable[Any]) -> str:
    """A digest of plain data, by its content.

    Keys of mappings and elements of sets count in any order; tuples count as lists, NumPy's numbers
    as Python's, NaN as itself. Arrays, tensors and pictures count by shape, type and elements, data
    classes by the fields that they are compared by. An object of another kind counts by its type
    alone: its text or its address would be another one in the next process.
    """
    digest = hashlib.sha256()
    for row in rows:
        content = _canonical(row, ())
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:_LENGTH]


def _canonical(value: Any, within: tuple[int, ...]) -> bytes:
    """Bytes that are equal where values are; `within`: ids of the containers around the value."""
    if isinstance(value, enum.Enum):
        return _tagged(_type_name(value), str(value.name).encode())
    if value is None or isinstance(value, bool):
        return _tagged("constant", str(value).encode())
    if isinstance(value, str):
        return _tagged("text", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _tagged("bytes", bytes(value))
    if isinstance(value, _AS_TEXT):
        return _tagged(_type_name(value), str(value).encode("utf-8", "surrogatepass"))
    if isinstance(value, Tensor):
        value = _as_array(value)
    if isinstance(value, (np.ndarray, np.generic)):
        # an array of objects holds addresses
        if value.ndim == 0 or value.dtype.hasobject:
            plain = value.tolist()
            if isinstance(plain, np.generic):  # Python has no number as long
                return _tagged(_type_name(value), str(plain).encode())
            return _canonical(plain, within)
        shape = f"{value.dtype.str}{value.shape}"
        return _tagged("array", shape.encode(), value.tobytes())
    if isinstance(value, Integral):
        return _tagged("integer", hex(value).encode())
    if isinstance(value, Real):
        return _tagged("real", _real(float(value)))
    if isinstance(value, Complex):
        number = complex(value)
        return _tagged("complex", _real(number.real), _real(number.imag))
    return _container(value, within)


def _container(value: Any, within: tuple[int, ...]) -> bytes:
    if id(value) in within:
        return _tagged("cycle", str(len(within) - within.index(id(value))).encode())
    within = (*within, id(value))
    if isinstance(value, Mapping):
        items = [(_canonical(key, within), _canonical(item, within)) for key, item in value.items()]
        return _tagged("mapping", *(part for pair in sorted(items) for part in pair))
    if isinstance(value, Set):
        return _tagged("set", *sorted(_canonical(item, within) for item in value))
    if isinstance(value, Sequence):
        return _tagged("list", *(_canonical(item, within) for item in value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.compare]
        parts = (_canonical(getattr(value, name), within) for name in fields)
        return _tagged(_type_name(value), *parts)
    image = sys.modules.get("PIL.Image")  # there can be no picture before it is imported
    if image is not None and isinstance(value, image.Image):
        return _tagged("image", f"{value.mode}{value.size}".encode(), value.tobytes())
    if isinstance(value, type) or hasattr(value, "__qualname__"):  # a class or a function
        return _tagged("named", _qualified(value))
    return _tagged(_type_name(value))


def _tagged(tag: str, *parts: bytes) -> bytes:
    """Parts with their lengths, so that no two lists of parts give the same bytes."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in (tag.encode(), *parts))


def _real(number: float) -> bytes:
    return b"nan" if math.isnan(number) else number.hex().encode()


def _as_array(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _type_name(value: Any) -> str:
    return _qualified(type(value)).decode()


def _qualified(named: Any) -> bytes:
    return f"{getattr(named, '__module__', None)}.{named.__qualname__}".encode()


@torch.no_grad()
def digest_tensors(tensors: Mapping[str, Tensor], *, exact: bool = False) -> str:
    """A digest of every element of named tensors, made where they lie.

    Floating-point elements count as rounded to bfloat16, so that weights loaded in 32 and in 16
    bits are known as the same; with `exact`, by their bits. Memory that tensors share is read once.
    """
    digest = hashlib.sha256()
    seen: dict[Any, str] = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in seen:
            dtype = tensor.dtype if exact else ""
            seen[key] = f"{dtype}{tuple(tensor.shape)} {_sums(tensor, exact=exact)}"
        digest.update(f"{name} {seen[key]}\n".encode())
    return digest.hexdigest()[:_LENGTH]


def _sums(tensor: Tensor, *, exact: bool) -> list[int]:
    """A sum of the elements of every chunk, weighted by place.

    In integers that wrap around, which add up to the same on every device and in every order.
    """
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    place = torch.arange(min(_CHUNK, flat.numel()), device=flat.device)
    weight = place * _SPREAD | 1  # odd and far apart, so that an exchange of two shows
    sums = []
    for part in flat.split(_CHUNK):
        if part.is_floating_point():
            part = part if exact else part.to(torch.bfloat16)
            part = part.view(_INTEGERS[part.element_size()])
        sums.append((part.to(torch.int64) * weight[: part.numel()]).sum())
    return torch.stack(sums).tolist() if sums else []
