"""A pytest plugin for where hypothesis is not installed: the tests that need it are skipped.

Their files import it at the top, and hold tests that do not need it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from unittest.mock import MagicMock

import pytest


def given(*_: object, **__: object):
    def skipped(_test: object):
        @pytest.mark.skip(reason="hypothesis is not installed")
        def property_of_any_input() -> None: ...

        return property_of_any_input

    return skipped


def settings(**_: object):
    return lambda test: test


hypothesis = ModuleType("hypothesis")
hypothesis.given = given
hypothesis.settings = settings
hypothesis.strategies = MagicMock()  # strategies only ever reach `given`
STAND_INS = {"hypothesis": hypothesis, "hypothesis.strategies": hypothesis.strategies}
sys.modules.update(STAND_INS)


def pytest_collection_finish() -> None:
    """The files are imported; PyTorch's test helpers look for hypothesis, and must find none."""
    for name in STAND_INS:
        del sys.modules[name]
