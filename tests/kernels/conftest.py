"""Triton kernels run on a GPU where there is one, and else under Triton's interpreter.

The interpreter must be asked for before Triton is first imported. Where another test's imports
came first, test_own_process.py runs these tests again in a process of their own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from interpreter import interpreter_fault

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.cuda)])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        rowwise = pytest.importorskip("grao_fast.kernels.rows.triton_rows")
        if not rowwise.runs_on(torch.device(device_for("triton"))):
            pytest.skip("Triton was imported without its interpreter; see test_own_process.py")
        if not torch.cuda.is_available() and (fault := interpreter_fault()):
            pytest.skip(fault)
    return request.param


def device_for(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture
def device(backend: str) -> str:
    return device_for(backend)


@pytest.fixture(autouse=True)
def quiet_padding() -> Iterator[None]:
    """Kernels compute on a slab's padding, which may hold anything; numpy would warn of it."""
    with np.errstate(all="ignore"):
        yield
