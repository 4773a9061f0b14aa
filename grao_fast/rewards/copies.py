"""Copies of a dataset's values, for functions that may change what they are given."""

from __future__ import annotations

import copy
import pickle
from typing import Any

_IMMUTABLE = (str, int, float, bool, type(None), bytes, complex)
# What a class that cannot be copied raises: locks, sockets, tensors inside a graph.
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
    """A deep copy of a value, down to objects that cannot be copied, which are passed as they are.

    Text and numbers are not copied, as nothing can change them.
    """
    return _copy(value, {})


def _copy(value: Any, copied: dict[int, Any]) -> Any:
    """`copied` has what was copied on the way here, by identity: data may hold itself."""
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
