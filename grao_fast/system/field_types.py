"""Checks that the values of a dataclass of options have their fields' types."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

from grao_fast.system.errors import UserError

_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def check_types(options: Any) -> None:
    """Raise UserError for values of another type than their field's, such as "false" for a bool.

    An int is accepted as a float, a bool as neither. NumPy's numbers are replaced by Python's, and
    lists by tuples. A field of several words (Literal) is only checked not to be None.
    """
    hints = get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value, hint = getattr(options, field.name), hints[field.name]
        accepted = _typed(field.name, value, hint, default=field.default)
        if accepted is not value:
            object.__setattr__(options, field.name, accepted)


def _typed(name: str, value: Any, hint: Any, *, default: Any) -> Any:
    hints = [each for each in get_args(hint) if each is not type(None)]
    if get_origin(hint) in (Literal, tuple) or not hints:
        hints = [hint]
        if value is None:
            raise UserError(
                f"{name} must be {_kind(hint)}, got None: leave it out for its default, {default!r}"
            )
    if value is None:
        return None
    hint = hints[0]
    if len(hints) > 1 and hasattr(value, "__iter__") and not isinstance(value, str):
        hint = next((each for each in hints if get_origin(each) is tuple), hint)
    if get_origin(hint) is Literal:
        return value
    if get_origin(hint) is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise UserError(f"{name} must be a list, got {value!r}")
        element = get_args(hint)[0]
        return tuple(
            each if element is str else _typed(name, each, element, default=default)
            for each in value
        )
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    of_type = isinstance(value, (int, float) if hint is float else hint)
    if not of_type or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{name} must be {_kind(hint)}, got {value!r}")
    return value


def _kind(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    return _KINDS.get(hint, "a list")
