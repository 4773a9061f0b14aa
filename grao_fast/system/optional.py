"""Imports packages that an extra of grao-fast installs."""

from __future__ import annotations

import importlib
from types import ModuleType

from grao_fast.system.errors import UserError


def import_optional(name: str, *, extra: str, option: str) -> ModuleType:
    """Import a package, or raise UserError that names the option that needs it and the extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f'{option} needs {name}: pip install "grao-fast[{extra}]"') from error
