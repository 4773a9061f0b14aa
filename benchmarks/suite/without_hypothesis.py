"""A pytest plugin for where hypothesis is not installed: the tests that need it are skipped.

Their files import it at the top, and hold tests that do not need it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from unittest.mock import MagicMock

import pytest


def given(*_: object, **__: object):
    return lambda _test: pytest.mark.skip(reason="hypothesis is not installed")(lambda: None)


def settings(**_: object):
    return lambda test: test


hypothesis = ModuleType("hypothesis")
hypothesis.given = given
hypothesis.settings = settings
hypothesis.strategies = MagicMock()  # strategies only ever reach `given`
sys.modules["hypothesis"] = hypothesis
sys.modules["hypothesis.strategies"] = hypothesis.strategies
