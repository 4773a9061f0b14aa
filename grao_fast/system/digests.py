"""Computes digests of data and weights that depend on their content alone, in every process."""

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
from torch.distributed.tensor import DTensor

# Types whose text is their whole content.
_AS_TEXT = (date, time, timedelta, Decimal, Fraction, UUID, PurePath, range, slice)
_LENGTH = 16  # hexadecimal digits of a digest
_CHUNK = 1 << 19  # elements of a tensor in one sum
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_SPREAD = 0x1E3779B97F4A7C15


def digest_rows(rows: Iterable[Any]) -> str:
    """Return a digest of plain data, by its content.

    The order of mappings and sets does not matter. A tuple equals a list, a NumPy number equals
    Python's, and NaN equals NaN. Arrays, tensors and images are compared by shape, type and
    elements, dataclasses by their fields with compare=True. Any other object counts by its type
    alone, since its text may contain an address, which differs between processes.
    """
    digest = hashlib.sha256()
    for row in rows:
        content = _canonical(row, ())
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:_LENGTH]


def _canonical(value: Any, within: tuple[int, ...]) -> bytes:
    """Return bytes that are equal for equal values; within: ids of the containers around one."""
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
        # the bytes of an array of objects would be addresses
        if value.ndim == 0 or value.dtype.hasobject:
            plain = value.tolist()
            if isinstance(plain, np.generic):  # such as longdouble, which Python lacks
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
        return _tagged("mapping", *(each for pair in sorted(items) for each in pair))
    if isinstance(value, Set):
        return _tagged("set", *sorted(_canonical(item, within) for item in value))
    if isinstance(value, Sequence):
        return _tagged("list", *(_canonical(item, within) for item in value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.compare]
        values = (_canonical(getattr(value, name), within) for name in fields)
        return _tagged(_type_name(value), *values)
    image = sys.modules.get("PIL.Image")  # not imported: then the value is not an image
    if image is not None and isinstance(value, image.Image):
        return _tagged("image", f"{value.mode}{value.size}".encode(), value.tobytes())
    if isinstance(value, type) or hasattr(value, "__qualname__"):  # a class or a function
        return _tagged("named", _qualified(value))
    return _tagged(_type_name(value))


def _tagged(tag: str, *fields: bytes) -> bytes:
    """Concatenate fields with their lengths, so that different fields never give the same bytes."""
    return b"".join(len(field).to_bytes(8, "little") + field for field in (tag.encode(), *fields))


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
    """Return a digest of all elements of named tensors, computed on their device.

    Floating-point elements are rounded to bfloat16 first, so that weights loaded in 32 and in 16
    bits have the same digest; with `exact`, their bits are used. Shared memory is read once. The
    digest of sharded tensors, which all processes must ask for, is that of the whole ones.
    """
    digest = hashlib.sha256()
    seen: dict[Any, str] = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        if isinstance(tensor, DTensor):  # gathered one at a time
            sums = _described(tensor.full_tensor(), exact=exact)
            digest.update(f"{name} {sums}\n".encode())
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in seen:
            seen[key] = _described(tensor, exact=exact)
        digest.update(f"{name} {seen[key]}\n".encode())
    return digest.hexdigest()[:_LENGTH]


def _described(tensor: Tensor, *, exact: bool) -> str:
    dtype = tensor.dtype if exact else ""
    return f"{dtype}{tuple(tensor.shape)} {_sums(tensor, exact=exact)}"


def _sums(tensor: Tensor, *, exact: bool) -> list[int]:
    """Return, for every chunk, the sum of its elements weighted by position.

    The sums are integers that wrap around: equal on every device and in every order of summation.
    """
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    place = torch.arange(min(_CHUNK, flat.numel()), device=flat.device)
    weight = place * _SPREAD | 1  # odd and far apart, so that swapped elements change the sum
    sums = []
    for chunk in flat.split(_CHUNK):
        if chunk.is_floating_point():
            chunk = chunk if exact else chunk.to(torch.bfloat16)
            chunk = chunk.view(_INTEGERS[chunk.element_size()])
        sums.append((chunk.to(torch.int64) * weight[: chunk.numel()]).sum())
    return torch.stack(sums).tolist() if sums else []
