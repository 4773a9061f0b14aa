"""Copies the values of a dataset, for functions that may change their arguments."""

from __future__ import annotations

import copy
import pickle
from typing import Any

_IMMUTABLE = (str, int, float, bool, type(None), bytes, complex)
# What copy.deepcopy raises for locks, sockets, tensors inside a graph and the like.
_UNCOPYABLE = (
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    OSError,
    copy.Error,
    pickle.PicklingError,
)


def own_copy(value: Any) -> Any:
    """Return a deep copy of a value; objects within it that cannot be copied are shared.

    Text and numbers are not copied, since they are immutable.
    """
    return _copy(value, {})


def _copy(value: Any, copied: dict[int, Any]) -> Any:
    """copied: copies so far, by the identity of the original, since data may contain itself."""
    kind = type(value)
    if kind in _IMMUTABLE:
        return value
    if id(value) in copied:
        return copied[id(value)]
    if kind is list:
        result = copied[id(value)] = []
        result.extend([_copy(item, copied) for item in value])
        return result
    if kind is dict:
        result = copied[id(value)] = {}
        result.update({key: _copy(item, copied) for key, item in value.items()})
        return result
    if kind is tuple:
        return tuple([_copy(item, copied) for item in value])
    try:
        return copy.deepcopy(value)
    except _UNCOPYABLE:
        return value
